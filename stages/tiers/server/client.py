"""The client of `tierloom serve`: address, TLS, token, handshake and connections."""

from __future__ import annotations

import errno
import hmac
import os
import secrets
import socket
import ssl
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

import anyio

from tierloom.stages.errors import ConfigError, TierDown
from tierloom.stages.tiers.net.address import Address
from tierloom.stages.tiers.net.connection_pool import ConnectionPool
from tierloom.stages.tiers.net.credentials import secret_in_file
from tierloom.stages.tiers.net.tls import client_context
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.connection import Connection
from tierloom.stages.tiers.server.shared_memory import SharedMemory

TOKEN = "TIERLOOM_TOKEN"
"""Environment variable of the token, where no file is named."""
PORT = 7654


def address_of(url: str) -> Address:
    """Raises ValueError."""
    return Address.parse(url, "tierloom", tls="tierloom+tls", unix="tierloom+unix", port=PORT)


class Handshake(NamedTuple):
    """What the two sides agreed on."""

    epoch: bytes
    welcome: wire.Welcome
    fd: int = -1
    """The server's memory; the receiver closes it."""
    said: bytes = b""
    """What both proved: epoch, nonces, namespace."""


class Rejected(TierDown):
    """Permanent rejection by the server; retrying will not help."""


def read_token(file: str) -> bytes:
    """The token out of a file, or of the environment; empty: there is none. Raises ConfigError."""
    token = (secret_in_file("token file", file) if file else os.environ.get(TOKEN, "")).strip()
    if file and not token:
        raise ConfigError(f"token file {file} is empty: write the secret into it")
    return token.encode()


async def connect_server(address: Address, context: ssl.SSLContext | None) -> Connection:
    """A connected connection. Raises OSError."""
    if address.path:
        return await _reach(socket.AF_UNIX, address.path)
    found: list[Any]
    try:  # a number needs no thread to be looked up
        found = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )
    except socket.gaierror:
        found = await anyio.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    error: OSError = OSError(f"host {address.host} has no address")
    for family, _, _, _, where in found:
        try:
            connection = await _reach(family, where)
        except OSError as e:
            error = e
            continue
        if context is None:
            return connection
        try:
            sock = context.wrap_socket(
                connection.sock, server_hostname=address.host, do_handshake_on_connect=False
            )
            connection = Connection(sock)
            await connection.handshake()
        except BaseException:
            connection.close()
            raise
        return connection
    raise error


async def _reach(family: int, where: object) -> Connection:
    connection = Connection(socket.socket(family, socket.SOCK_STREAM))
    try:
        code = connection.sock.connect_ex(where)  # type: ignore[arg-type]
        if code == errno.EINPROGRESS:
            await anyio.wait_writable(connection.sock)
            code = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    except BaseException:
        connection.close()
        raise
    if code:
        connection.close()
        raise OSError(code, os.strerror(code))
    return connection


async def shake_hands(
    connection: Connection, token: bytes, namespace: bytes, *, memory: bool, lands: bool = False
) -> Handshake:
    """Greeting, hello, welcome. `memory`: ask for the server's. `lands`: offer one's own to be
    written into. Raises TierDown, OSError."""
    greeting = wire.unpack(wire.Greeting, (await _said(connection, wire.Kind.GREETING)).body)
    if not greeting.oldest <= wire.VERSION <= greeting.newest:
        raise Rejected(
            f"the server speaks protocol versions {greeting.oldest} to {greeting.newest}, "
            f"this tierloom {wire.VERSION}: use the same release on both sides"
        )
    if greeting.guarded and not token:
        raise Rejected(f"the server requires a token; set token_file, or {TOKEN}")
    if token and not greeting.guarded:
        raise Rejected(
            "the server requires no token although one is configured: it may be another's; "
            "remove the token or fix the url"
        )
    nonce = secrets.token_bytes(wire.NONCE)
    said = (greeting.epoch, greeting.nonce, nonce, namespace)
    proof = wire.proof(token, b"client", *said)
    flags = wire.MEMORY * memory + wire.LANDS * lands
    hello = wire.Hello(wire.VERSION, flags, namespace, nonce, proof)
    await connection.send(wire.message(wire.Kind.HELLO, 0, wire.pack(hello)))
    fds: list[int] = []
    try:
        if memory:  # by `recvmsg`: an ordinary read would lose what comes with the bytes
            await anyio.wait_readable(connection.sock)
            raw, fds, _, _ = socket.recv_fds(connection.sock, wire.WELCOME_BYTES, 1)
            connection.push_back(raw)
        welcome = wire.unpack(wire.Welcome, (await _said(connection, wire.Kind.WELCOME)).body)
        if not hmac.compare_digest(welcome.proof, wire.proof(token, b"server", *said)):
            raise Rejected(
                "the server could not prove that it knows our token; it may be another server"
            )
        lends = welcome.flags & wire.MEMORY and fds
        return Handshake(greeting.epoch, welcome, fds.pop() if lends else -1, b"".join(said))
    finally:
        for fd in fds:
            os.close(fd)


class Client:
    """The connections of one tier, and the one to the server's memory. On one loop."""

    def __init__(
        self, address: Address, namespace: bytes, anew: Callable[[], None], *, share: bool
    ) -> None:
        """`anew`: called when the server turns out to have been restarted. `share`: map its memory,
        where it is on this host and allows it."""
        self._address, self._namespace, self._anew = address, namespace, anew
        self.shares = share and bool(address.path)
        self.lands = False
        """Offer memory to be written into."""
        self.welcome = wire.Welcome(0, b"", 0, 0, 0)
        self._epoch = b""
        self._pool: ConnectionPool[Connection] | None = None
        self._shared_memory: SharedMemory | None = None

    @property
    def epoch(self) -> bytes:
        """Of the server that was spoken to last; empty: of none."""
        return self._epoch

    def prepare(self, token_file: str, ca_file: str, connections: int) -> None:
        """Raises ConfigError."""
        self._token = read_token(token_file)
        self._context = client_context(ca_file) if self._address.tls else None
        self._pool = ConnectionPool(self._connect, connections)
        self._meeting = anyio.Lock()

    def close(self) -> None:
        if self._shared_memory is not None:
            self._shared_memory.retire()
        if self._pool is not None:
            self._pool.close()

    def drop_dead(self) -> int:
        """Close idle connections whose server has gone; how many are left."""
        return self._pool.drop_dead() if self._pool is not None else 0

    def connection(self) -> AbstractAsyncContextManager[Connection]:
        """A connection for one question; closed unless that was answered to its end."""
        assert self._pool is not None
        return self._pool.connection()

    async def shared_memory(self) -> SharedMemory | None:
        """The connection to the server's memory; None if it is not shared."""
        async with self._meeting:
            if self._shared_memory is not None:
                if self._shared_memory.is_there:
                    return self._shared_memory
                self._shared_memory.retire()
            from tierloom.stages.tiers.server.shared_memory import SharedMemory

            connection, known = await self._dial(memory=True)
            if known.fd < 0:
                self.shares = False
                connection.close()
                return None
            try:
                self._shared_memory = SharedMemory(connection, known.fd, known.welcome.memory)
            except BaseException:
                connection.close()
                raise
            finally:
                os.close(known.fd)
            return self._shared_memory

    async def _connect(self) -> Connection:
        return (await self._dial(memory=False))[0]

    async def _dial(self, *, memory: bool) -> tuple[Connection, Handshake]:
        connection = await connect_server(self._address, self._context)
        try:
            known = await shake_hands(
                connection, self._token, self._namespace, memory=memory, lands=self.lands
            )
        except BaseException:
            connection.close()
            raise
        if self._epoch and known.epoch != self._epoch:
            self._anew()
            if self._shared_memory is not None:
                self._shared_memory.retire()
        self._epoch, self.welcome = known.epoch, known.welcome
        connection.said = known.said
        return connection, known

    def proof(self, connection: Connection, *said: bytes) -> bytes:
        """Proves to the server of this connection that what is said comes from who knows the
        token."""
        return wire.proof(self._token, b"agent", connection.said, *said)


async def _said(connection: Connection, kind: wire.Kind) -> wire.Message:
    message = await connection.message(wire.FIRST)
    refuse(message, kind)
    return message


def refuse(message: wire.Message, wanted: wire.Kind) -> None:
    """Raise unless the message is of the wanted kind."""
    if message.kind is wanted:
        return
    if message.kind is wire.Kind.ERROR:
        code, text = wire.error_of(message.body)
        final = code in (wire.ErrorCode.TOKEN, wire.ErrorCode.VERSION)
        raise (Rejected if final else TierDown)(f"the server says: {text}")
    raise wire.BadMessage(f"unexpected {message.kind.name}, expected {wanted.name}")
