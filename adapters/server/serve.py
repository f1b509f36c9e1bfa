"""`tierloom serve`: the tiers of a pipeline file as one store for many engines.

One loop, one task per client and no thread for any. docs/protocol.md says what is spoken.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import secrets
import signal
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import anyio
import anyio.lowlevel

from tierloom.adapters.server.session import Lending, Session, Terms
from tierloom.pipeline.config.spec import PipelineSpec
from tierloom.pipeline.object_store import ObjectStore
from tierloom.stages.errors import ConfigError
from tierloom.stages.tiers.net.address import Address
from tierloom.stages.tiers.server.client import PORT, TOKEN, read_token
from tierloom.stages.tiers.server.connection import Connection

log = logging.getLogger("tierloom.serve")

_WINDOW = 64 << 20
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
            raise ConfigError(f"--listen {self}: {error.strerror or error}") from None

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


class Serving:
    """A store and its listeners; `run` is its whole life."""

    def __init__(
        self, spec: PipelineSpec, listens: Sequence[Listen], *, token: bytes = b"",
        context: ssl.SSLContext | None = None, clients: int = 512, drain: float = 10.0,
    ) -> None:  # fmt: skip
        """`context`: TLS, for listeners that want it. `drain`: seconds that are left to what is
        under way when it is to end. Raises ConfigError."""
        if not spec.tiers:
            raise ConfigError(f"{spec.source}: has no tiers to serve")
        if context is None and any(listen.tls for listen in listens):
            raise ConfigError("tls:// needs a certificate: pass --cert and --key")
        self._listens, self._context = listens, context
        self._clients, self._drain = clients, drain
        self.store = ObjectStore(spec, shared=any(listen.path for listen in listens))
        lends = self.store.kept_in_memory // 4
        window = min(_WINDOW, self.store.largest)
        self._terms = Terms(token, secrets.token_bytes(16), window, lends)
        self._lending = Lending(2 * lends)
        self.sessions: set[Session] = set()

    async def run(self, started: Callable[[list[str]], None], stop: anyio.Event) -> None:
        """Serve until `stop`, then shut down in order. `started` is called with the addresses."""
        with contextlib.ExitStack() as home:
            socks = [home.enter_context(_bound(listen)) for listen in self._listens]
            try:
                await self.store.open()
                async with anyio.create_task_group() as tasks:
                    self.store.start(tasks)
                    async with anyio.create_task_group() as doors:
                        for listen, sock in zip(self._listens, socks, strict=True):
                            doors.start_soon(self._accept, sock, listen.tls, tasks)
                        started([at.url(s) for at, s in zip(self._listens, socks, strict=True)])
                        await stop.wait()
                        doors.cancel_scope.cancel()
                    home.close()
                    await self._finish()
                    tasks.cancel_scope.cancel()
            finally:
                with anyio.CancelScope(shield=True):
                    await self.store.close()

    async def _finish(self) -> None:
        """Let every client's question, and what waits for colder tiers, come to its end."""
        for session in self.sessions:
            session.end()
        with anyio.move_on_after(self._drain):
            while any(not s.gone for s in self.sessions):  # noqa: ASYNC110 - once, at the end
                await anyio.sleep(0.01)
            await self.store.settled()

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
        return Session(connection, self.store, self._terms, self._lending)

    async def _serve(self, session: Session) -> None:
        try:
            await session.serve(_HELLO)
        finally:
            self.sessions.discard(session)


@contextlib.contextmanager
def _bound(listen: Listen) -> Iterator[socket.socket]:
    sock = listen.bind()
    try:
        yield sock
    finally:
        sock.close()
        if listen.path:
            with contextlib.suppress(OSError):
                os.unlink(listen.path)


def certificate(cert: Path, key: Path) -> ssl.SSLContext:
    """TLS with our certificate. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key)
    except OSError as error:
        raise ConfigError(f"--cert {cert}, --key {key}: {error}; both must be PEM") from None
    return context


def run_serve(
    config: str, urls: Sequence[str], *, token_file: str, cert: Path | None, key: Path | None,
    without_token: bool, clients: int, drain: float, say: Callable[[str], None],
) -> None:  # fmt: skip
    """What the command does, until SIGTERM or SIGINT. Raises ConfigError."""
    from tierloom.pipeline.config.load import load_config

    listens = [Listen.at(url) for url in urls]
    token = read_token(token_file)
    for listen in listens:
        if not listen.is_local and not token and not without_token:
            raise ConfigError(
                f"--listen {listen} can be reached from other hosts: name a "
                f"--token-file, or set {TOKEN}; or pass --without-token"
            )
    if (cert is None) != (key is None):
        raise ConfigError("--cert and --key go together")
    context = certificate(cert, key) if cert is not None and key is not None else None
    serving = Serving(
        load_config(config), listens, token=token, context=context, clients=clients, drain=drain
    )

    def started(where: list[str]) -> None:
        for url in where:
            say(f"listening on {url}")

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    failed: list[ConfigError] = []

    async def main() -> None:
        stop = anyio.Event()
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:

            async def watch() -> None:
                async for _ in signals:
                    stop.set()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch)
                try:
                    await serving.run(started, stop)
                except ConfigError as error:
                    failed.append(error)
                tasks.cancel_scope.cancel()

    anyio.run(main)
    if failed:
        raise failed[0]
