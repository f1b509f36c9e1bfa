"""Where a process answers over HTTP, as a user writes it. Light: engines check it early."""

from __future__ import annotations

from tierloom.stages.tiers.net.address import Address

HTTP_PORT = 7655


def http_address(at: str) -> Address:
    """`HOST:PORT`, `http://HOST:PORT` or `https://HOST:PORT`. Raises ValueError."""
    url = at if "://" in at else f"http://{at}"
    return Address.parse(url, "http", tls="https", port=HTTP_PORT)


def http_url(at: str) -> str:
    """What others ask there; empty: nobody is, or at a port that is not known yet."""
    if not at or not (found := http_address(at)).port:
        return ""
    host = f"[{found.host}]" if ":" in found.host else found.host
    return f"{'https' if found.tls else 'http'}://{host}:{found.port}"
