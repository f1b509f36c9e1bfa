"""InfiniStore's protocol over TCP: one connection, one request at a time, each with an end.

The library that comes with InfiniStore is not used. Asked for an absent key it waits forever (an
error is four bytes long, and it waits for eight); it takes over the process's handlers of SIGSEGV
and SIGABRT; it cannot read into memory of ours. A request is

    magic u32, operation u8, bytes of the body u32, body [, value]

where the body is a key, or a FlatBuffer of one table. The answer is a code i32, after 200 followed
by an i32, which for a read is the length of the value that comes next. Little-endian.
"""

from __future__ import annotations

import socket
import struct
import time

from tierloom.stages.errors import TierDown
from tierloom.stages.tiers.net.address import Address

_REQUEST = struct.Struct("<IcI")
_CODE = struct.Struct("<i")
_MAGIC = 0xDEADBEEF
_DONE, _ABSENT, _FULL = 200, 404, 507
_WASTE = 1 << 16
_KEYS = struct.pack("<IHHHHiIII", 12, 0, 6, 8, 4, 6, 4, 1, 4)
"""A table of one field: root, vtable, table, a vector of one offset; its string comes next."""


class InfinistoreConnection:
    """A connection, useless after any error. Raises TierDown, OSError."""

    def __init__(self, address: Address, deadline: float) -> None:
        self._end = time.monotonic() + deadline
        self._line = socket.create_connection(address[:2], deadline)
        self._line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def until(self, end: float) -> InfinistoreConnection:
        """What follows must be over at `end` of the monotonic clock."""
        self._end = end
        return self

    def close(self) -> None:
        self._line.close()

    def exists(self, key: str) -> bool:
        self._send(b"C", key.encode())
        self._expect(_DONE)
        return self._number() == 0

    def put(self, key: str, value: memoryview | bytes) -> bool:
        """Keep a value; False when there is no room. Small ones go out in one packet."""
        self._send(b"L", _payload(b"P", key, len(value)), value)
        return self._expect(_DONE, _FULL) == _DONE

    def read_into(self, key: str, view: memoryview) -> bool | None:
        """Whether the value is as long as `view`, and has been read into it; None: not there."""
        size = self._ask(key)
        if size is None:
            return None
        if size != len(view):
            self._skip(size)
            return False
        self._fill(view)
        return True

    def read(self, key: str, limit: int) -> bytes | None:
        """A value of at most `limit` bytes, empty when it is longer; None: not there."""
        size = self._ask(key)
        if size is None:
            return None
        if size > limit:
            self._skip(size)
            return b""
        value = bytearray(size)
        self._fill(memoryview(value))
        return bytes(value)

    def remove(self, key: str) -> bool:
        """Whether it was there."""
        self._send(b"X", _KEYS + _text(key))
        self._expect(_DONE)
        return self._number() == 1

    def _ask(self, key: str) -> int | None:
        self._send(b"L", _payload(b"G", key, 0))
        # The server sends a small value only when what it sent before is acknowledged: 40 ms else.
        self._line.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        if self._expect(_DONE, _ABSENT) == _ABSENT:
            return None
        size = self._number()
        if size < 0:
            raise TierDown(f"infinistore: a value of {size} bytes")
        return size

    def _send(self, operation: bytes, body: bytes, value: memoryview | bytes = b"") -> None:
        head = _REQUEST.pack(_MAGIC, operation, len(body)) + body
        if len(value) <= 1024:  # a value that comes in two packets is seen half
            head, value = head + bytes(value), b""
        self._wait()
        self._line.sendall(head, socket.MSG_MORE if value else 0)
        if value:
            self._wait()
            self._line.sendall(value)

    def _expect(self, *codes: int) -> int:
        code = self._number()
        if code not in codes:
            raise TierDown(f"infinistore: answered with code {code}")
        return code

    def _number(self) -> int:
        raw = bytearray(_CODE.size)
        self._fill(memoryview(raw))
        return int(_CODE.unpack(raw)[0])

    def _fill(self, view: memoryview) -> None:
        while view:
            self._wait()
            count = self._line.recv_into(view)
            if not count:
                raise TierDown("infinistore: the connection was closed")
            view = view[count:]

    def _skip(self, size: int) -> None:
        """Read and discard a value: the server crashes if a reader disconnects in the middle."""
        waste = memoryview(bytearray(min(size, _WASTE)))
        while size:
            part = waste[: min(size, _WASTE)]
            self._fill(part)
            size -= len(part)

    def _wait(self) -> None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("infinistore: no answer in time")
        self._line.settimeout(left)


def _text(key: str) -> bytes:
    """A FlatBuffer's string: length, bytes, a zero, and padding to four."""
    raw = key.encode()
    return struct.pack("<I", len(raw)) + raw + bytes(4 - len(raw) % 4)


def _payload(operation: bytes, key: str, nbytes: int) -> bytes:
    """Table {key: string at 8, bytes: i32 at 12, operation: i8 at 7}."""
    root = struct.pack("<IHHHHHHi", 16, 0, 10, 16, 8, 12, 7, 10)
    return root + b"\0\0\0" + operation + struct.pack("<Ii", 8, nbytes) + _text(key)
