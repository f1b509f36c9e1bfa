"""EngineListener: a pipeline's own tiers for other engines, on a thread with a loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from tierloom.pipeline.config.spec import ServeOptions
from tierloom.pipeline.serve.listener import Listen, Listener, certificate
from tierloom.pipeline.serve.own_tiers import OwnTiers
from tierloom.pipeline.serve.terms import RateLimit, Terms
from tierloom.stages.errors import ConfigError, TierDown
from tierloom.stages.tiers.landing.options import use_nixl
from tierloom.stages.tiers.net.address import Address
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.client import TOKEN, connect_server, read_token
from tierloom.stages.user_home import expanded

if TYPE_CHECKING:
    from tierloom.pipeline.serve.announced import AnnouncedTiers
    from tierloom.stages.tiers.landing.sender import Sender

log = logging.getLogger("tierloom.serve")

_DRAIN = 0.5
"""Seconds that are left to what is under way at the end."""
_DIAL = 2.0
"""Seconds within which our own address must answer."""
_NOWHERE = ("192.0.2.1", 9)
"""Nobody's address (RFC 5737): which of ours would send there is known without a packet."""


class EngineListener:
    """From `start` to `close`. Nothing that fails here fails the pipeline."""

    def __init__(
        self, options: ServeOptions, store: OwnTiers, epoch: bytes,
        announced: AnnouncedTiers | None = None,
    ) -> None:  # fmt: skip
        """`epoch`: 16 bytes, by which an engine that dials itself knows it. `announced`: run as
        long as others are let in. Raises ConfigError."""
        listen = Listen(*options.at)
        token = read_token(options.token_file)
        if not listen.is_local and not token:
            raise ConfigError(
                f"serve.listen {listen} can be reached from other hosts: name a token_file, or set "
                f"{TOKEN}"
            )
        files = Path(expanded(options.cert_file)), Path(expanded(options.key_file))
        context = certificate(*files) if listen.tls else None
        host = announced.host if announced is not None else None
        self._sender = _sender(options, store)
        limit = RateLimit(options.limit)
        terms = Terms(token, epoch, store.largest, 0, limit, host, self._sender)
        self._listener = Listener(store, [listen], terms, context=context, clients=options.clients)
        self._store, self._listen, self._epoch = store, listen, epoch
        self._options, self._announced = options, announced
        self._thread = threading.Thread(target=self._run, name="tierloom-serve", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self.address = ""
        """As another's tier `peer` names it; empty: nothing is served."""

    def start(self) -> None:
        """Nothing is served, and the log says why, where the port is another's."""
        try:
            (url,) = self._listener.bind()
        except ConfigError as error:
            self._listener.close()
            log.warning("nothing is served to other engines: %s", error)
            return
        self.address = self._reached_at(url)
        self._thread.start()
        self._ready.wait()

    def close(self, timeout: float = 5.0) -> None:
        """Clients are told to go. Idempotent."""
        if self._loop is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it has just ended
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(timeout)
        self._listener.close()
        if self._sender is not None:  # before the arena goes
            self._sender.close()

    def figures(self) -> dict[str, int]:
        """Clients, objects given so far, bytes that are being sent, and bytes that are lent."""
        store, sessions = self._store, len(self._listener.sessions)
        written = self._sender.written if self._sender is not None else 0
        return {
            "clients": sessions, "given": store.given, "held": store.held, "written": written,
            "lent": store.lent_bytes,
        }  # fmt: skip

    def _run(self) -> None:
        try:
            anyio.run(self._live)
        except Exception:
            log.exception("nothing is served to other engines any more")
        finally:
            self._listener.close()
            self._ready.set()

    async def _live(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), anyio.Event()
        self._ready.set()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._dial_oneself)
            if self._announced is not None:
                tasks.start_soon(self._announced.run, self.address)
            await self._listener.run(tasks, self._stop)
            with anyio.move_on_after(_DRAIN):
                await self._listener.gone()
            if self._sender is not None:  # sessions wait for what it has under way
                self._sender.close()
            tasks.cancel_scope.cancel()

    def _reached_at(self, url: str) -> str:
        """The address that others dial, of the one that came out of `bind`."""
        scheme, _, rest = url.partition("://")
        if self._listen.path:
            return f"tierloom+unix://{rest}"
        port = rest.rpartition(":")[2]
        here = _outward() if self._listen.host in ("0.0.0.0", "::") else self._listen.host
        host, number = self._options.reached_at(here, int(port))
        host = f"[{host}]" if ":" in host else host
        return f"tierloom{'+tls' if scheme == 'tls' else ''}://{host}:{number}"

    async def _dial_oneself(self) -> None:
        """Say so where nobody can reach the address that is told to others."""
        scheme = "tierloom+tls" if self._listen.tls else "tierloom"
        address = Address.parse(self.address, scheme, unix="tierloom+unix")
        try:
            with anyio.fail_after(_DIAL):
                connection = await connect_server(address, None)  # TLS: that it answers will do
                try:
                    if not self._listen.tls:
                        said = await connection.message(wire.FIRST)
                        if wire.unpack(wire.Greeting, said.body).epoch != self._epoch:
                            raise TierDown("somebody else answers there")
                finally:
                    connection.close()
        except (OSError, TimeoutError, TierDown) as error:
            log.warning(
                "other engines cannot read what this one keeps: no way from here to %s, %s; set "
                "serve.advertise to an address that they can dial",
                *(self.address, str(error) or "no answer"),
            )


def _sender(options: ServeOptions, store: OwnTiers) -> Sender | None:
    """What writes objects into memory of other engines; None: they come in the connection. Raises
    MissingPackage."""
    if not use_nixl(options.wire) or (options.at.tls and options.wire == "auto"):
        return None
    from tierloom.stages.tiers.landing import sender

    return sender.Sender(store.arena, options.nixl.backend, options.nixl.options)


def _outward() -> str:
    """This host's address towards others; loopback where it has none."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(_NOWHERE)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
