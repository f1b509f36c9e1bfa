"""One connection of the server protocol, over TCP, TLS or a unix socket; for either side.

The calling task reads and writes the socket itself, so a cancelled one stops at once: no byte lands
in memory that was released. A connection left in the middle of a message is closed.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable, Iterable
from functools import partial

import anyio
import anyio.lowlevel

from tierloom.stages.errors import TierDown
from tierloom.stages.memory.arena import Lease
from tierloom.stages.memory.held import held
from tierloom.stages.tiers.server import protocol as wire

_PIECE = 2 << 20
"""Bytes of one system call, and of one wake-up: of 1 MiB they took a quarter more CPU."""
_TURN = 4 << 20
"""Bytes between two turns of the loop."""
_BULK = 64 << 10
"""From this many bytes on, waking up for each packet is not worth it."""
_SLOWEST = 1 << 20
"""Bytes per second that a peer must at least receive or send."""


class Disconnected(TierDown):
    """The other side closed the connection."""


class Connection:
    """Owns a connected socket."""

    def __init__(self, sock: socket.socket, *, stall: float = 0.0) -> None:
        """`stall`: seconds, besides one for each MiB, after which a message that has begun or
        bytes that were announced must have passed; 0: the caller has limits of its own."""
        sock.setblocking(False)
        self.sock = sock
        self.said = b""
        """What both sides proved to each other."""
        self.agent = ""
        """The agent that the other side was told of here, last."""
        self._stall = stall
        self._buffer = memoryview(bytearray(16 << 10))
        self._start = self._end = self._waits = 0
        self._plain = not isinstance(sock, ssl.SSLSocket)
        self._tcp = sock.family != socket.AF_UNIX
        self._low = 1
        if self._tcp:
            for option, value in (
                (socket.TCP_NODELAY, 1),
                (socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3),
            ):  # fmt: skip
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        else:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, 4 << 20)

    async def handshake(self) -> None:
        """The TLS handshake, if there is TLS."""
        if isinstance(self.sock, ssl.SSLSocket):
            with self._within(0):
                await self._do(self.sock.do_handshake)

    async def readable(self) -> bool:
        """Wait, without a limit, until something has come; whether it was there already."""
        before = self._waits
        while self._start == self._end:
            await self._more()
        return self._waits == before

    async def message(self, limit: int = wire.BODY) -> wire.Message:
        """The next message. Raises BadMessage, Disconnected, OSError."""
        await self.readable()
        came = self._end - self._start
        if came >= wire.HEAD.size:  # mostly all of it is there, and needs no time limit
            kind, number, length = wire.head(self._buffer[self._start :][: wire.HEAD.size], limit)
            if came >= wire.HEAD.size + length:
                self._start += wire.HEAD.size
                return wire.Message(kind, number, await self._take(length))
        with self._within(0):
            kind, number, length = wire.head(await self._take(wire.HEAD.size), limit)
            return wire.Message(kind, number, await self._take(length))

    def push_back(self, raw: bytes) -> None:
        """Have these bytes, which were received elsewhere, read next. The buffer must be empty."""
        self._start, self._end = 0, len(raw)
        self._buffer[: self._end] = raw

    async def fill(self, view: memoryview, *, leases: Iterable[Lease] = ()) -> None:
        """The next `len(view)` bytes, without a copy on the way. `leases`: whose memory it is."""
        with held(*leases):
            await self._fill(view)

    async def _fill(self, view: memoryview) -> None:
        at = min(len(view), self._end - self._start)
        view[:at] = self._buffer[self._start : self._start + at]
        self._start += at
        turn = _TURN
        with self._within(len(view)):
            while at < len(view):
                self._wake_at(len(view) - at)
                got = await self._receive(view[at : at + _PIECE])
                at += got
                turn -= got
                if turn <= 0:
                    turn = _TURN
                    await anyio.lowlevel.checkpoint()
        self._wake_at(1)

    async def skip(self, nbytes: int) -> None:
        """Read and discard `nbytes`."""
        waste = memoryview(bytearray(min(nbytes, _PIECE)))
        while nbytes:
            piece = waste[: min(nbytes, len(waste))]
            await self.fill(piece)
            nbytes -= len(piece)

    async def send(self, *parts: bytes | memoryview, leases: Iterable[Lease] = ()) -> None:
        """All of them, one after another. `leases`: whose memory they are."""
        with held(*leases):
            await self._send(parts)

    async def _send(self, parts: Iterable[bytes | memoryview]) -> None:
        turn = _TURN
        for part in parts:
            view = memoryview(part)
            if len(view) < _BULK and self._plain:  # mostly it is taken at once
                with contextlib.suppress(BlockingIOError):
                    view = view[self.sock.send(view) :]
            with self._within(len(view)) if len(view) else contextlib.nullcontext():
                while len(view):
                    piece = view[:_PIECE]
                    sent = await self._do(partial(self.sock.send, piece), writes=True)
                    view = view[sent:]
                    turn -= sent
                    if turn <= 0:
                        turn = _TURN
                        await anyio.lowlevel.checkpoint()

    @property
    def usable(self) -> bool:
        """Open, and nothing unexpected has come."""
        if self._start != self._end or self.sock.fileno() < 0:
            return False
        try:
            if self._plain:
                self.sock.recv(1, socket.MSG_PEEK)
            else:
                self._end = self.sock.recv_into(self._buffer[:1])
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        if self.sock.fileno() >= 0:
            with contextlib.suppress(Exception):  # the loop is closed: nobody waits for it
                anyio.notify_closing(self.sock)
            self.sock.close()

    def _within(self, nbytes: int) -> contextlib.AbstractContextManager[object]:
        if not self._stall:
            return contextlib.nullcontext()
        return anyio.fail_after(self._stall + nbytes / _SLOWEST)

    async def _take(self, nbytes: int) -> bytes:
        if nbytes > len(self._buffer):
            whole = bytearray(nbytes)
            await self.fill(memoryview(whole))
            return bytes(whole)
        while self._end - self._start < nbytes:
            await self._more()
        self._start += nbytes
        return bytes(self._buffer[self._start - nbytes : self._start])

    async def _more(self) -> None:
        """Receive into the buffer, whose rest is moved to its front."""
        left = self._end - self._start
        if self._start:
            self._buffer[:left] = bytes(self._buffer[self._start : self._end])
            self._start, self._end = 0, left
        self._end += await self._receive(self._buffer[left:])

    async def _receive(self, view: memoryview) -> int:
        got = await self._do(partial(self.sock.recv_into, view))
        if not got:
            raise Disconnected("the other side closed the connection")
        return got

    async def _do(self, call: Callable[[], int | None], *, writes: bool = False) -> int:
        """A system call, as soon as it does not block. TLS may have to write in order to read."""
        while True:
            try:
                return call() or 0
            except BlockingIOError:
                wait = anyio.wait_writable if writes else anyio.wait_readable
            except ssl.SSLWantReadError:
                wait = anyio.wait_readable
            except ssl.SSLWantWriteError:
                wait = anyio.wait_writable
            self._waits += 1
            await wait(self.sock)

    def _wake_at(self, nbytes: int) -> None:
        """Let the kernel wake us only after `nbytes` have come, as far as it can."""
        if self._tcp and self._plain:
            low = min(nbytes, _PIECE) if nbytes >= _BULK else 1
            if low != self._low:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low)
                self._low = low
