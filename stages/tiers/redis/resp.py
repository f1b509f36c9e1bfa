"""RESP2, the protocol of Redis and Valkey: commands to bytes, bytes to replies. No I/O.

Payloads go straight into the memory that was named for them; everything else is small and bounded.
What cannot be a reply to what was asked raises, and its connection must then be closed.
Specification: redis.io/docs/latest/develop/reference/protocol-spec.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from tierloom.stages.errors import BadObject, TierDown, TierloomError
from tierloom.stages.memory.arena import Lease

_ROOM = 16 << 10  # bytes of the buffer while nothing larger than a few small answers is expected
_LINE = 1024  # longest line: errors are the long ones
_DEPTH = 6  # arrays within arrays; CLUSTER SLOTS has 4


class ErrorReply(NamedTuple):
    """The server's answer to a command that it did not carry out: a value, not an exception."""

    code: str
    """Its first word, `OOM` or `WRONGTYPE`; never more, since servers quote what they were sent."""


Reply: TypeAlias = "bytes | int | ErrorReply | list[Reply] | None"


def command(*words: bytes | str | int) -> bytes:
    """One command, as it is sent."""
    raw = [w if isinstance(w, bytes) else str(w).encode() for w in words]
    return b"*%d\r\n" % len(raw) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in raw)


@dataclass(slots=True)
class PendingReply:
    """Replies that are due, in the order in which the commands went out."""

    future: asyncio.Future[list[Reply]]
    count: int = 1
    limit: int = 16 << 10
    """Most bytes of all of them together."""
    into: memoryview | None = None
    """Where one bulk string goes; the reply is then its length. A longer one is refused."""
    lease: Lease | None = None
    """Whose memory is sent from or received into; held until that is over."""
    got: list[Reply] = field(default_factory=list)

    def begin(self) -> None:
        if self.lease is not None:
            self.lease.retain()

    def end(self) -> None:
        lease, self.lease = self.lease, None
        if lease is not None:
            lease.release()


class _Incomplete(TierloomError):
    """The bytes end inside a reply."""


class ReplyParser:
    """Turns incoming bytes into replies. Call `get_buffer` and `took` alternately."""

    def __init__(self) -> None:
        self._buffer = bytearray(_ROOM)
        self._begin = self._end = 0  # what has come, and was not yet looked at
        self._wants: deque[PendingReply] = deque()
        self._body: memoryview | None = None  # of the first want
        self._filled = 0

    @property
    def due(self) -> bool:
        """Something is still to come."""
        return bool(self._wants)

    def expect(self, want: PendingReply) -> None:
        want.begin()
        self._wants.append(want)

    def fail(self, error: Exception) -> None:
        """The connection ended: the first want gets `error`, the others TierDown.

        No memory that was named is touched again.
        """
        wants, self._wants, self._body = self._wants, deque(), None
        for n, want in enumerate(wants):
            want.end()
            if not want.future.done():
                first = not n or not isinstance(error, BadObject)
                want.future.set_exception(error if first else TierDown("the connection was closed"))
                want.future.exception()  # it need not be awaited

    def get_buffer(self) -> memoryview:
        """Where the next bytes go; never empty. Raises TierDown when there is no room for them."""
        if self._body is not None and self._filled < len(self._body):
            return self._body[self._filled :]
        if self._end == len(self._buffer):
            self._make_room()
        return memoryview(self._buffer)[self._end :]

    def took(self, nbytes: int) -> None:
        """`nbytes` have come into the buffer. Raises TierDown or BadObject; then call `fail`."""
        if self._body is not None and self._filled < len(self._body):
            self._filled += nbytes
        else:
            self._end += nbytes
        try:
            while self._wants:
                self._next(self._wants[0])
        except _Incomplete:
            return
        if self._begin < self._end:
            raise TierDown("a reply that was not requested")
        self._begin = self._end = 0
        if len(self._buffer) > _ROOM:
            self._buffer = bytearray(_ROOM)

    def _next(self, want: PendingReply) -> None:
        if want.into is not None:
            answer = self._bulk_into(want.into)
        else:
            answer, end = self._parse(self._begin, want.limit, 0)
            want.limit -= end - self._begin
            self._begin = end
        want.got.append(answer)
        if len(want.got) == want.count:
            self._wants.popleft().end()
            if not want.future.done():  # otherwise its caller was cancelled
                want.future.set_result(want.got)

    def _bulk_into(self, into: memoryview) -> Reply:
        """A bulk string's length, once all of it has been placed; None for a null one."""
        if self._body is None:
            kind, text, at = self._line(self._begin)
            if kind == b"-":
                self._begin = at
                return _refusal(text)
            if kind != b"$":
                raise TierDown(f"expected a bulk string, got {kind!r}")
            length = _number(text)
            if length == -1:
                self._begin = at
                return None
            if not 0 <= length <= len(into):
                raise BadObject(f"{length} bytes came, at most {len(into)} were expected")
            here = min(self._end - at, length)
            into[:here] = memoryview(self._buffer)[at : at + here]
            self._body, self._filled, self._begin = into[:length], here, at + here
        if self._filled < len(self._body):
            self._begin = self._end = 0
            raise _Incomplete
        self._begin = self._crlf(self._begin)
        length, self._body = len(self._body), None
        return length

    def _parse(self, at: int, limit: int, depth: int) -> tuple[Reply, int]:
        """The answer at `at`, and where it ends."""
        kind, text, at = self._line(at)
        if kind == b"+":
            return text, at
        if kind == b"-":
            return _refusal(text), at
        if kind == b":":
            return _number(text), at
        if kind not in (b"$", b"*"):
            raise TierDown(f"a reply cannot begin with {kind!r}")
        size = _number(text)
        if size == -1:
            return None, at
        if not 0 <= size <= limit // (3 if kind == b"*" else 1) or depth == _DEPTH:
            raise TierDown(f"a reply of {size} parts or bytes is longer than {limit} bytes")
        if kind == b"$":
            if self._end - at < size + 2:
                raise _Incomplete
            return bytes(self._buffer[at : at + size]), self._crlf(at + size)
        parts: list[Reply] = []
        for _ in range(size):
            part, at = self._parse(at, limit, depth + 1)
            parts.append(part)
        return parts, at

    def _line(self, at: int) -> tuple[bytes, bytes, int]:
        """Topology, text and end of the line at `at`."""
        end = self._buffer.find(b"\r\n", at, min(self._end, at + _LINE))
        if end < 0:
            if self._end - at >= _LINE:
                raise TierDown(f"a line longer than {_LINE} bytes")
            raise _Incomplete
        return bytes(self._buffer[at : at + 1]), bytes(self._buffer[at + 1 : end]), end + 2

    def _crlf(self, at: int) -> int:
        if self._end - at < 2:
            raise _Incomplete
        if self._buffer[at : at + 2] != b"\r\n":
            raise TierDown("bulk string not terminated by CRLF")
        return at + 2

    def _make_room(self) -> None:
        kept = self._end - self._begin
        if kept == len(self._buffer):
            limit = self._wants[0].limit + 2 * _LINE if self._wants else 0
            if kept >= limit:
                raise TierDown("a reply longer than expected")
            # A new one: whoever asked for the last buffer may still hold a view of it.
            larger = bytearray(min(2 * kept, limit))
            larger[:kept] = self._buffer
            self._buffer = larger
        else:
            self._buffer[:kept] = self._buffer[self._begin : self._end]
        self._begin, self._end = 0, kept


def _number(text: bytes) -> int:
    digits = text[1:] if text[:1] == b"-" else text
    if not digits.isdigit() or len(digits) > 19:
        raise TierDown(f"{text[:24]!r} is not a number")
    return int(text)


def _refusal(text: bytes) -> ErrorReply:
    word = text.split(b" ", 1)[0][:24]
    return ErrorReply(word.decode() if word.isalpha() and word.isupper() else "ERR")
