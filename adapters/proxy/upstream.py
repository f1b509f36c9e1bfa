"""An engine's HTTP/1.1 server, as the proxy asks it: few microseconds of CPU for a streamed token.

A general client costs more for a piece of a stream than all else that the proxy does. Here pieces
are what the engine sent as chunks, read out of asyncio's own buffer. Anything that is not HTTP/1.1
as RFC 9112 frames it is an error, never a guess.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from urllib.parse import urlsplit

from tierloom.stages.errors import ConfigError

Headers = Sequence[tuple[bytes, bytes]]
"""Names in lower case."""
PIECE = 1 << 16
"""Bytes of a body that are read at once, at most."""
_CONNECT = 2.0
"""Seconds that a connection may take to come about."""
_IDLE = 4.0
"""Seconds after which a connection is not used again: engines close theirs after 5."""
_STATUS = re.compile(rb"HTTP/1\.([01]) (\d{3})(?: |$)")
_SIZE = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;.*)?\r\n")
_PLACE = re.compile(r"[A-Za-z0-9.\-_:\[\]]+")
_BREAK = re.compile(rb"[\r\n\0]")


class EngineFailed(Exception):
    """An engine could not be reached, ended too early, or did not speak HTTP. The text is why."""


class EngineLate(EngineFailed):
    """It had time enough, and is alive."""


class EngineAnswer:
    """Status and headers of an answer; its body is still to be read. Whoever has it closes it.
    `first`: bytes that `begin` has read; `rest`: what follows, None for a body that is whole."""

    def __init__(self, line: _Line, status: int, headers: Headers, length: int | None) -> None:
        self.status, self.headers = status, headers
        self.length = length
        """Bytes of the body; -1: chunks, None: all until the connection ends."""
        self.first = b""
        self.rest: AsyncIterator[bytes] | None = None
        self._line: _Line | None = line

    async def begin(self, most: int, *, all_of_it: bool = False) -> None:
        """Read the first of the body; all, if that is `most` bytes by what its headers say, or if
        it is wanted. Raises EngineFailed."""
        if all_of_it or (self.length is not None and 0 <= self.length <= most):
            body = bytearray()
            async for piece in self.pieces():
                body += piece
                if len(body) > most:
                    raise EngineFailed(f"answered with more than {most} bytes")
            self.first = bytes(body)
        else:
            self.rest = self.pieces()
            self.first = await anext(self.rest, b"")

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body, as it comes. Raises EngineFailed if it ends early."""
        assert self._line is not None
        reader = self._line.reader
        try:
            if self.length == -1:
                while size := _SIZE.fullmatch(head := await reader.readuntil(b"\r\n")):
                    left = int(size[1], 16)
                    if left == 0:
                        break
                    while left > PIECE:
                        yield (piece := await reader.read(PIECE))
                        left -= len(piece)
                        if not piece:
                            raise EngineFailed("ended in the middle of a chunk")
                    piece = await reader.readexactly(left + 2)
                    if not piece.endswith(b"\r\n"):
                        raise EngineFailed("sent a chunk of another length than it said")
                    yield piece[:-2]
                else:
                    raise EngineFailed(f"sent {head[:40]!r} for the length of a chunk")
                while await reader.readuntil(b"\r\n") != b"\r\n":
                    pass  # trailers
            elif self.length is None:
                while piece := await reader.read(PIECE):
                    yield piece
            else:
                left = self.length
                while left:
                    if not (piece := await reader.read(min(left, PIECE))):
                        raise EngineFailed("ended in the middle of an answer")
                    left -= len(piece)
                    yield piece
        except (OSError, EOFError, asyncio.LimitOverrunError) as error:
            raise EngineFailed(f"ended in the middle of an answer ({_why(error)})") from error
        self._line.keep()
        self._line = None

    def __enter__(self) -> EngineAnswer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the connection go; if the answer is not at its end, the engine sees its client leave
        and aborts the request."""
        if self._line is not None:
            self._line.drop()
            self._line = None


class _Line:
    """One connection."""

    def __init__(self, owner: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self._writer, self._owner = reader, writer, owner
        self.since = 0.0
        self.lasting = self.begun = False

    @property
    def usable(self) -> bool:
        if self._writer.is_closing() or self.reader.at_eof():
            return False
        unasked = getattr(self.reader, "_buffer", True)  # it would pass for the next answer
        return not unasked and time.monotonic() - self.since < _IDLE

    async def send(self, data: bytes, body: bytes) -> None:
        self._writer.write(data + body if len(body) < PIECE else data)
        if len(body) >= PIECE:
            self._writer.write(body)
            await self._writer.drain()

    def keep(self) -> None:
        """An answer was read to its end."""
        if self.lasting:
            self.since, self.begun = time.monotonic(), False
            self._owner.keep(self)
        else:
            self.drop()

    def drop(self) -> None:
        self._writer.transport.abort()


class Upstream:
    """One engine's server and the connections to it. For one event loop."""

    def __init__(self, url: str) -> None:
        """`url`: http://HOST:PORT or https://HOST:PORT, with or without /v1. Raises ConfigError."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"engine {url!r}: {error}") from None
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        odd = parts.query or parts.fragment or not _PLACE.fullmatch(parts.netloc)
        if parts.scheme not in ("http", "https") or not parts.hostname or odd or prefix:
            raise ConfigError(f"engine {url!r}: write http://HOST:PORT or https://HOST:PORT")
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.host, self.port = parts.hostname, port or (443 if self.tls else 80)
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._host = f"host: {parts.netloc}\r\n".encode()
        self._idle: list[_Line] = []
        self._ended = False

    async def ask(
        self, method: bytes, target: bytes, headers: Headers = (), body: bytes = b""
    ) -> EngineAnswer:
        """Send a request; its answer as soon as its headers are there. `headers` name no host and
        no length. Raises EngineFailed; a connection that was kept and is gone by now is none."""
        parts = [method, b" ", target, b" HTTP/1.1\r\n", self._host]
        if body or method == b"POST":
            parts.append(b"content-length: %d\r\n" % len(body))
        for name, value in headers:
            parts += name, b": ", value, b"\r\n"
        data = b"".join((*parts, b"\r\n"))
        while self._idle:
            line = self._idle.pop()
            if not line.usable:
                line.drop()
                continue
            try:
                return await self._over(line, data, body)
            except EngineFailed:
                if line.begun:
                    raise
        return await self._over(await self._dial(), data, body)

    async def _dial(self) -> _Line:
        try:
            dial = asyncio.open_connection(self.host, self.port, ssl=self.tls, limit=PIECE)
            return _Line(self, *await asyncio.wait_for(dial, _CONNECT))
        except asyncio.TimeoutError:
            raise EngineFailed(f"took no connection in {_CONNECT:.0f} s") from None
        except (OSError, UnicodeError) as error:
            raise EngineFailed(f"takes no connection ({_why(error)})") from error

    async def _over(self, line: _Line, data: bytes, body: bytes) -> EngineAnswer:
        try:
            await line.send(data, body)
            while True:
                head = await line.reader.readuntil(b"\r\n\r\n")
                line.begun = True  # from here on an end is the engine's doing
                answer = _parsed(line, head)
                if answer.status >= 200:
                    return answer
        except (OSError, EOFError, asyncio.LimitOverrunError) as error:
            line.drop()
            if isinstance(error, asyncio.IncompleteReadError) and error.partial:
                line.begun = True
                raise EngineFailed(f"answered {error.partial[:40]!r}, which is not HTTP") from error
            raise EngineFailed(f"ended before it answered ({_why(error)})") from error
        except BaseException:
            line.drop()
            raise

    def keep(self, line: _Line) -> None:
        """Take a connection for the next request."""
        if self._ended:
            line.drop()
        else:
            self._idle.append(line)

    def close(self, *, for_good: bool = False) -> None:
        """Close what is idle. `for_good`: and what becomes idle later."""
        self._ended = self._ended or for_good
        while self._idle:
            self._idle.pop().drop()


def _parsed(line: _Line, head: bytes) -> EngineAnswer:
    """Raises EngineFailed."""
    first, *rest = head[:-4].split(b"\r\n")
    if (said := _STATUS.match(first)) is None:
        raise EngineFailed(f"answered {first[:40]!r}, which is not HTTP")
    headers = []
    for text in rest:
        name, colon, value = text.partition(b":")
        if not name or name != name.strip() or not colon or _BREAK.search(text):
            raise EngineFailed(f"sent {text[:40]!r} for a header")
        headers.append((name.lower(), value.strip()))
    lengths = {v for n, v in headers if n == b"content-length"}
    codings = [v.lower() for n, v in headers if n == b"transfer-encoding"]
    ends = {v.lower() for n, v in headers if n == b"connection"}
    status, length = int(said[2]), None
    if status < 200 or status in (204, 304):
        length = 0
    elif codings:
        if codings != [b"chunked"]:
            raise EngineFailed(f"sent its answer as {codings[0][:40]!r}; only chunks are known")
        length = -1
    elif lengths:
        value = lengths.pop()
        if lengths or not value.isdigit() or len(value) > 15:
            raise EngineFailed(f"sent {value[:40]!r} for the length of its answer")
        length = int(value)
    line.lasting = said[1] == b"1" and b"close" not in ends and length is not None
    return EngineAnswer(line, status, headers, length)


def _why(error: BaseException) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    return "a line that does not end" if isinstance(error, asyncio.LimitOverrunError) else "closed"
