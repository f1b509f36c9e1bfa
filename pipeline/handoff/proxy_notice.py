"""What LMCache's proxy waits for: a note on a ZMQ socket that a request's KV is at its decoder.

The note is LMCache's `ProxyNotif`, which msgspec writes as a msgpack map of two strings: `type`
and `req_id`. Both sides are here, without msgspec.
"""

from __future__ import annotations

import logging
from typing import Any

import anyio

from tierloom.stages.errors import require

log = logging.getLogger("tierloom.handoff")

_KIND = "ProxyNotif"
_AGAIN = 0.02
"""Seconds between two looks whether the proxy has taken the connection."""
_LINGER = 500
"""Milliseconds that notes have left when the socket closes."""
_STR8, _STR16 = 0xD9, 0xDA


def pack_notice(request: str) -> bytes:
    """`request`: its name at the proxy, of at most 65,535 bytes. Raises ValueError."""
    words = ("type", _KIND, "req_id", request)
    return b"\x82" + b"".join(_packed(word.encode()) for word in words)


def unpack_notice(raw: bytes) -> str:
    """The request's name. Raises ValueError where it is no such note."""
    words, at = list[str](), 1
    while raw[:1] == b"\x82" and len(words) < 4:
        begin, length = _text_at(raw, at)
        at = begin + length
        words.append(raw[begin:at].decode())
        if at > len(raw):
            break
    said = dict(zip(words[::2], words[1::2], strict=False))
    if at != len(raw) or said.keys() != {"type", "req_id"} or said["type"] != _KIND:
        raise ValueError(f"not a note of a request whose KV is there: {raw[:40]!r}")
    return said["req_id"]


class ProxyNotices:
    """A connection to a proxy, on one loop. Made again by ZMQ when the proxy restarts, which gets
    none of the notes that were meant for the one before."""

    def __init__(self, at: str) -> None:
        """`at`: HOST:PORT. Raises MissingPackage."""
        require("events", "zmq")
        self.at = at
        self._socket: Any = None
        self._silent = False

    async def tell(self, request: str, count: int, wait: float) -> None:
        """Send a note `count` times. A proxy that takes none within `wait` seconds gets none."""
        import zmq

        socket = self._socket or self._connected(zmq)
        note, told = pack_notice(request), 0
        with anyio.move_on_after(wait):
            while told < count:
                if socket.poll(0, zmq.POLLOUT):
                    socket.send(note, zmq.NOBLOCK)
                    told += 1
                else:
                    await anyio.sleep(_AGAIN)
        if told < count and not self._silent:
            log.warning("handoff.proxy: nobody takes notes at %s", self.at)
        self._silent = told < count

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close(_LINGER)
            self._socket = None

    def _connected(self, zmq: Any) -> Any:
        self._socket = socket = zmq.Context.instance().socket(zmq.PUSH)
        socket.setsockopt(zmq.IMMEDIATE, 1)  # to a proxy that is there, and to no later one
        socket.connect(f"tcp://{self.at}")
        return socket


def _packed(text: bytes) -> bytes:
    if len(text) < 32:
        return bytes([0xA0 | len(text)]) + text
    if len(text) < 1 << 8:
        return bytes([_STR8, len(text)]) + text
    if len(text) < 1 << 16:
        return bytes([_STR16]) + len(text).to_bytes(2, "big") + text
    raise ValueError(f"a name of {len(text)} bytes; at most 65,535 are allowed")


def _text_at(raw: bytes, at: int) -> tuple[int, int]:
    """Where a text begins, and its bytes. Raises ValueError."""
    first = raw[at] if at < len(raw) else 0
    if first & 0xE0 == 0xA0:
        return at + 1, first & 0x1F
    if first in (_STR8, _STR16):
        size = 1 if first == _STR8 else 2
        return at + 1 + size, int.from_bytes(raw[at + 1 : at + 1 + size], "big")
    raise ValueError(f"not a text at byte {at} of a note: {raw[:40]!r}")
