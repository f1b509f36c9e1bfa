"""Where clients come in: addresses, sockets, and a session for each client.

One loop, one task per client and no thread for any. docs/protocol.md says what is spoken.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path

import anyio
import anyio.lowlevel

from tierloom.pipeline.serve.object_store import ObjectStore
from tierloom.pipeline.serve.own_tiers import OwnTiers
from tierloom.pipeline.serve.session import Session
from tierloom.pipeline.serve.terms import Lending, Terms
from tierloom.stages.errors import ConfigError
from tierloom.stages.tiers.net.address import Address
from tierloom.stages.tiers.server.client import PORT
from tierloom.stages.tiers.server.connection import Connection

log = logging.getLogger("tierloom.serve")

_STRANGERS = 64
"""Connections that have not yet said who they are."""
_HELLO, _STALL = 5.0, 10.0
"""Seconds for a client to say who it is, and for a message to come to its end."""


class Listen(Address):
    """Where to listen."""

    __slots__ = ()

    @classmethod
    def at(cls, url: str) -> Listen:
        """`tcp://HOST:PORT`, `tls://HOST:PORT` or `unix:///PATH`. Raises ConfigError."""
        try:
            return cls(*Address.parse(url, "tcp", tls="tls", unix="unix", port=PORT))
        except ValueError as error:
            raise ConfigError(f"--listen: {error}") from None

    @property
    def is_local(self) -> bool:
        """Nobody on another host can reach it."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def bind(self) -> socket.socket:
        """Raises ConfigError."""
        try:
            if self.path:
                return self._bind_path()
            family, _, _, _, where = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            return socket.create_server(where[:2], family=family, backlog=512)
        except OSError as error:
            raise ConfigError(f"cannot listen at {self}: {error.strerror or error}") from None

    def _bind_path(self) -> socket.socket:
        """A socket for our own user alone. One that nobody listens at any more is replaced."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(self.path) == errno.ECONNREFUSED:
                    os.unlink(self.path)
            before = os.umask(0o177)
            try:
                sock.bind(self.path)
            finally:
                os.umask(before)
            sock.listen(512)
        except BaseException:
            sock.close()
            raise
        return sock

    def url(self, sock: socket.socket) -> str:
        """As it came out, with the port that was chosen."""
        if self.path:
            return f"unix://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'tls' if self.tls else 'tcp'}://{host}:{sock.getsockname()[1]}"


class Listener:
    """Bound sockets and the clients that came in by them; on one loop."""

    def __init__(
        self, store: ObjectStore | OwnTiers, listens: Sequence[Listen], terms: Terms, *,
        context: ssl.SSLContext | None = None, clients: int = 512,
    ) -> None:  # fmt: skip
        """`context`: TLS, for those of `listens` that want it. `clients`: at most, at once. Raises
        ConfigError."""
        if context is None and any(listen.tls for listen in listens):
            raise ConfigError("tls:// needs a certificate: pass --cert and --key")
        self._store, self._listens, self._terms = store, listens, terms
        self._context, self._clients = context, clients
        self._socks: list[socket.socket] = []
        self.lending = Lending(2 * terms.lends)
        self.sessions: set[Session] = set()

    def bind(self) -> list[str]:
        """The addresses, with the ports that were chosen. Raises ConfigError; `close` it then."""
        for listen in self._listens:
            self._socks.append(listen.bind())
        return [at.url(sock) for at, sock in zip(self._listens, self._socks, strict=True)]

    def close(self) -> None:
        """Nobody comes in any more. Idempotent."""
        for listen, sock in zip(self._listens, self._socks, strict=False):
            sock.close()
            if listen.path:
                with contextlib.suppress(OSError):
                    os.unlink(listen.path)
        self._socks = []

    def renew(self, token: bytes) -> None:
        """Who comes from now on must have this token."""
        self._terms = self._terms._replace(token=token)

    async def run(self, tasks: anyio.abc.TaskGroup, stop: anyio.Event) -> None:
        """Let clients in until `stop`, and then tell them to go. Their sessions are `tasks`."""
        async with anyio.create_task_group() as doors:
            for listen, sock in zip(self._listens, self._socks, strict=True):
                doors.start_soon(self._accept, sock, listen.tls, tasks)
            await stop.wait()
            doors.cancel_scope.cancel()
        self.close()
        for session in self.sessions:
            session.end()

    async def gone(self) -> None:
        """Wait until every client's question has come to its end."""
        while any(not s.gone for s in self.sessions):  # noqa: ASYNC110 - once, at the end
            await anyio.sleep(0.01)

    async def _accept(self, listener: socket.socket, tls: bool, tasks: anyio.abc.TaskGroup) -> None:
        listener.setblocking(False)
        while True:
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                await anyio.wait_readable(listener)
                continue
            except OSError as error:  # no file descriptors left, or the client has gone already
                log.warning("accept failed: %s", error)
                await anyio.sleep(0.1)
                continue
            strangers = sum(not s.welcomed for s in self.sessions)
            if len(self.sessions) >= self._clients or strangers >= _STRANGERS:
                sock.close()
                await anyio.lowlevel.checkpoint()  # who floods us with these stops nobody else
                continue
            session = self._session(sock, tls)
            if session is not None:
                self.sessions.add(session)  # at once: the next one of a burst must see it
                tasks.start_soon(self._serve, session)

    def _session(self, sock: socket.socket, tls: bool) -> Session | None:
        """Of a connection that was accepted; None where it is closed already."""
        try:
            if tls and self._context is not None:
                sock.setblocking(False)
                sock = self._context.wrap_socket(
                    sock, server_side=True, do_handshake_on_connect=False
                )
            connection = Connection(sock, stall=_STALL)
        except OSError:
            sock.close()
            return None
        return Session(connection, self._store, self._terms, self.lending)

    async def _serve(self, session: Session) -> None:
        try:
            await session.serve(_HELLO)
        finally:
            self.sessions.discard(session)


def certificate(cert: Path, key: Path) -> ssl.SSLContext:
    """TLS with our certificate. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key)
    except OSError as error:
        raise ConfigError(f"certificate {cert}, key {key}: {error}; both must be PEM") from None
    return context
