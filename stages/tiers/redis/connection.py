"""Connections to Redis servers on asyncio, each wait of which has a limit.

A connection belongs to one call at a time. When that call ends before its answers are all there,
the connection is closed at once: from then on no byte of it reaches memory, whoever that memory
belongs to by then, and nothing unread is left for the next call.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import anyio

from tierloom.stages.errors import BadObject, TierDown
from tierloom.stages.memory.arena import Lease
from tierloom.stages.tiers.net.address import Address
from tierloom.stages.tiers.redis.resp import ErrorReply, PendingReply, Reply, ReplyParser, command

_SLICE = 1 << 20
"""Bytes handed to the transport at once. What a socket does not take Python 3.11 copies, and with
every send again: of a MiB that costs less than more turns would, of 32 MiB it costs most."""
_HIGH = 64 << 10  # bytes in the transport at which we wait


class Credentials(NamedTuple):
    """What to log in with."""

    user: str
    password: str
    db: int
    tls: ssl.SSLContext | None

    def __repr__(self) -> str:
        return "Credentials(...)"  # whatever prints it, prints no password


class AuthError(TierDown):
    """Authentication failed: the configured user, password or database is wrong."""


class RespConnection(asyncio.BufferedProtocol):
    """One connection, whose answers come in the order of the commands."""

    def __init__(self, where: str, stall: float) -> None:
        self.error: Exception | None = None
        """Why it was closed."""
        loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[None] = loop.create_future()
        self._where, self._stall, self._loop = where, stall, loop
        self._answers = ReplyParser()
        self._transport: asyncio.Transport | None = None
        self._room: asyncio.Future[None] | None = None  # not there while we may write
        self._moved = 0.0  # when a byte last went or came
        self._watch: asyncio.TimerHandle | None = None
        self._sink = memoryview(bytearray(4096))

    @property
    def usable(self) -> bool:
        return self.error is None and not self._answers.due

    async def call(self, commands: Sequence[bytes], *, limit: int = 64 << 10) -> list[Reply]:
        """The answers to small commands, sent at once; `limit` bytes at most."""
        if not commands:
            return []
        want = PendingReply(self._loop.create_future(), count=len(commands), limit=limit)
        await self.send([b"".join(commands)], want)
        return await want.future

    def fetch(
        self, asked: bytes, lease: Lease, begin: int, stop: int
    ) -> asyncio.Future[list[Reply]]:
        """Ask for a bulk string, to land at `begin` to `stop` of a lease, which is held meanwhile;
        the answer is its length, or None."""
        want = PendingReply(self._loop.create_future(), into=lease.view[begin:stop], lease=lease)
        self._expect(want)
        self._write(asked)
        return want.future

    async def send(self, parts: Iterable[bytes | memoryview], want: PendingReply) -> PendingReply:
        """Send one or more commands, as fast as the server takes them. What is sent of a lease,
        `want` names."""
        self._expect(want)
        for part in parts:
            for at in range(0, len(part), _SLICE):
                if self._room is not None:
                    await self._room
                    self._moved = self._loop.time()
                self._write(part[at : at + _SLICE] if len(part) > _SLICE else part)
        return want

    def close(self) -> None:
        self.abort(TierDown("the connection was closed"))

    def abort(self, error: Exception) -> None:
        """Close at once. Callers that wait for a reply get `error`. Idempotent."""
        if self.error is not None:
            return
        self.error = error
        if self._transport is not None:
            self._transport.abort()  # it may keep what it has not sent: that is leased still
        self._answers.fail(error)
        self.resume_writing()
        if self._watch is not None:
            self._watch.cancel()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_HIGH)

    def connection_lost(self, exc: Exception | None) -> None:
        self.abort(
            TierDown(f"redis at {self._where} closed the connection{f': {exc}' if exc else ''}")
        )
        if not self.gone.done():
            self.gone.set_result(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self.error is None:
            try:
                return self._answers.get_buffer()
            except TierDown as error:
                self.abort(self._lie(error))
        return self._sink

    def buffer_updated(self, nbytes: int) -> None:
        if self.error is not None:
            return
        self._moved = self._loop.time()
        try:
            self._answers.took(nbytes)
        except TierDown as error:
            self.abort(self._lie(error))
        except BadObject as error:
            self.abort(error)

    def pause_writing(self) -> None:
        self._room = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        self._room = None

    def _lie(self, error: TierDown) -> TierDown:
        return TierDown(f"redis at {self._where} does not speak RESP2: {error}")

    def _write(self, data: bytes | memoryview) -> None:
        if self.error is not None:
            raise self.error
        assert self._transport is not None
        self._transport.write(data)

    def _expect(self, want: PendingReply) -> None:
        if self.error is not None:
            raise self.error
        self._answers.expect(want)
        self._moved = self._loop.time()
        if self._watch is None:
            self._watch = self._loop.call_later(self._stall, self._look)

    def _look(self) -> None:
        """Close the connection if a reply is due and nothing moves."""
        self._watch = None
        if not self._answers.due:
            return
        left = self._moved + self._stall - self._loop.time()
        if left > 0:
            self._watch = self._loop.call_later(left, self._look)
        else:
            self.abort(TierDown(f"redis at {self._where}: no traffic for {self._stall:g} s"))


async def connect_redis(address: Address, login: Credentials, stall: float) -> RespConnection:
    """A connection that is logged in. Raises AuthError, TierDown, OSError."""
    loop = asyncio.get_running_loop()

    def make() -> RespConnection:
        return RespConnection(str(address), stall)

    try:
        with anyio.fail_after(stall):
            if address.path:
                _, connection = await loop.create_unix_connection(make, address.path)
            else:
                name = address.host if login.tls else None
                _, connection = await loop.create_connection(
                    make, address.host, address.port, ssl=login.tls, server_hostname=name
                )
    except TimeoutError as error:
        raise TierDown(
            f"redis at {address} did not accept a connection within {stall:g} s"
        ) from error
    try:
        await _log_in(connection, address, login)
    except BaseException:
        connection.abort(TierDown("login failed"))
        raise
    return connection


async def _log_in(connection: RespConnection, address: Address, login: Credentials) -> None:
    hello = []
    if login.password:
        who = [login.user] if login.user else []
        hello.append(command("AUTH", *who, login.password))
    hello.append(command("SELECT", login.db) if login.db else command("PING"))
    for answer in await connection.call(hello):
        if isinstance(answer, ErrorReply) and answer.code != "MISCONF":  # to PING: no writes now
            if answer.code in ("LOADING", "MASTERDOWN"):
                raise TierDown(f"redis at {address} is not ready: {answer.code}")
            # What it says besides may quote the password.
            raise AuthError(
                f"redis at {address} rejects user {login.user or 'default'!r}, database "
                f"{login.db}: {answer.code}; check user, password and database"
            )
