"""Where an HTTP server of ours listens."""

from __future__ import annotations

import ipaddress
import socket

from tierloom.stages.errors import ConfigError


def http_socket(host: str, port: int, option: str) -> socket.socket:
    """A socket that listens; port 0: one that is free. `option`: what named it. Raises
    ConfigError."""
    # asyncio sets TCP_NODELAY only where it sees that it is TCP: else each answer waits 40 ms
    listener = None
    try:
        family, _, _, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(2048)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ConfigError(f"{option}: {error.strerror or error}") from None
    return listener


def is_loopback(host: str) -> bool:
    """No other host can reach it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
