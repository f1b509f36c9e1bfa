"""Who may come in by HTTP: address, token, certificate."""

from __future__ import annotations

import calendar
import hmac
import json
import re
import ssl
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from tierloom.adapters.door.http_socket import is_loopback
from tierloom.adapters.engine.http_option import http_address
from tierloom.stages.errors import ConfigError
from tierloom.stages.tiers.server.client import TOKEN, read_token

PROBES = ("/livez", "/readyz", "/healthz", "/health")
"""What whoever starts and stops processes asks without a token; it tells no address."""
MOST_BODY = 8 << 20
"""Bytes of a request's body, at most."""
_VALID = re.compile(
    rb"0[\x1e\x20\x22](?:\x17\x0d\d{12}|\x18\x0f\d{14})Z(?:\x17\x0d(\d{12})|\x18\x0f\d\d(\d{12}))Z"
)
"""Of a certificate in DER: from when and until when it is valid (RFC 5280, 4.1.2.5)."""

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[..., Awaitable[None]]], Any]


class Entrance:
    """An address, and what is asked of who comes there. Token and certificate may be renewed."""

    def __init__(
        self, at: str, *, option: str = "--http", token_file: str = "", cert: Path | None = None,
        key: Path | None = None,
    ) -> None:  # fmt: skip
        """`token_file`: else the environment variable TIERLOOM_TOKEN. Raises ConfigError: other
        hosts are let in only with a token."""
        try:
            self.address = http_address(at)
        except ValueError as error:
            raise ConfigError(f"{option}: {error}") from None
        self.option = option
        self._token_file, self._files = token_file, (cert, key)
        self.token = b""
        self.context: ssl.SSLContext | None = None
        self.ends = 0.0
        """Until when the certificate is valid, in seconds since 1970; 0: there is none."""
        self.renew()

    def renew(self) -> None:
        """Read token and certificate. Raises ConfigError, and all stays as it was."""
        token, (cert, key) = read_token(self._token_file), self._files
        if not token and not is_loopback(self.address.host):
            raise ConfigError(
                f"{self.option} {self.address} can be reached from other hosts: name a token file, "
                f"or set {TOKEN}"
            )
        if self.address.tls:
            if cert is None or key is None:
                raise ConfigError(f"{self.option} {self.address}: https:// needs a certificate and "
                                  "its key")  # fmt: skip
            from tierloom.pipeline.serve.listener import certificate

            fresh = certificate(cert, key)
            if self.context is None:
                self.context = fresh
            else:  # connections from now on
                self.context.load_cert_chain(cert, key)
            self.ends = valid_until(cert)
        self.token = token

    def refusal(
        self, path: str, headers: dict[bytes, bytes], method: str = "GET"
    ) -> tuple[int, str] | None:
        """Status and reason for who may not come in; None: it may."""
        if method not in ("GET", "HEAD") and b"origin" in headers:  # pages may send, and not read
            return 403, f"{path}: orders are taken from programs, not from pages in a browser"
        if not self.token:  # or a page that a browser shows could read it, by a name of its own
            host = headers.get(b"host", b"").decode("latin-1").rpartition("@")[2]
            name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
            if not is_loopback(name):
                return 403, f"Host {name!r} is not this one: ask by localhost, or set a token"
            return None
        given = headers.get(b"authorization", b"")
        if path in PROBES or hmac.compare_digest(given, b"Bearer " + self.token):
            return None
        return 401, f"{path}: send the token as `Authorization: Bearer TOKEN`"


class Guard:
    """An ASGI application before another: lets in whom the entrance lets in."""

    def __init__(self, app: App, entrance: Entrance) -> None:
        self._app, self._entrance = app, entrance

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        refused = self._entrance.refusal(scope["path"], headers, scope["method"])
        if refused is None:
            length = headers.get(b"content-length", b"0")
            if b"transfer-encoding" not in headers and int(length) <= MOST_BODY:
                await self._app(scope, receive, send)
                return
            refused = 413, f"a body has a length, and {MOST_BODY >> 20} MiB at most"
        status, why = refused
        told = [(b"content-type", b"application/json")]
        told += [(b"www-authenticate", b"Bearer")] * (status == 401)
        body = json.dumps({"detail": why}).encode()
        told.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": told})
        await send({"type": "http.response.body", "body": body})


def valid_until(cert: Path) -> float:
    """Seconds since 1970 at which the first certificate of a PEM file ends; 0: not found."""
    try:
        pem = re.search("-----BEGIN CERT.*?-----END CERTIFICATE-----", cert.read_text(), re.DOTALL)
        found = _VALID.search(ssl.PEM_cert_to_DER_cert(pem[0])) if pem else None
    except (OSError, ValueError):
        return 0.0
    if found is None:
        return 0.0
    last = (found[1] or found[2]).decode()
    century = "20" if found[2] is not None or last < "50" else "19"
    return float(calendar.timegm(time.strptime(century + last, "%Y%m%d%H%M%S")))
