"""Where a server listens."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urlsplit

from tierloom.stages.options import masked


class Address(NamedTuple):
    """A port of a host, or the path of a socket."""

    host: str = ""
    port: int = 0
    path: str = ""
    tls: bool = False

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"

    @classmethod
    def parse(
        cls, url: str, plain: str, *, tls: str = "", unix: str = "", port: int = 0
    ) -> Address:
        """`PLAIN://HOST:PORT`, and `TLS://HOST:PORT` and `UNIX:///PATH` where these schemes are
        given. `port`: where the URL names none; 0: it must. Raises ValueError, without a password
        that the URL may hold."""
        forms = [f"{plain}://HOST:PORT"]
        forms += [f"{tls}://HOST:PORT"] * bool(tls) + [f"{unix}:///PATH"] * bool(unix)
        wrong = ValueError(f"url {masked(url)!r}: write {' or '.join(forms)}")
        try:
            parts = urlsplit(url)
            number = port if parts.port is None else parts.port
        except ValueError:
            raise wrong from None
        scheme = parts.scheme
        if unix and scheme == unix and not parts.netloc and parts.path.startswith("/"):
            return cls(path=parts.path)
        known = scheme == plain or (tls and scheme == tls)
        given = number or parts.port is not None
        if not known or not parts.hostname or not given or parts.username or parts.path.strip("/"):
            raise wrong
        return cls(parts.hostname, number, tls=scheme == tls)
