"""`tierloom serve`: the tiers of a pipeline file as one store for many engines."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import ssl
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from tierloom.adapters.server.log_format import write_log
from tierloom.adapters.server.service_notice import ServiceNotice
from tierloom.adapters.server.start_report import say_what_is_kept, warn_of_access
from tierloom.pipeline.config.spec import PipelineSpec
from tierloom.pipeline.run.loop_thread import awaited
from tierloom.pipeline.serve.listener import Listen, Listener, certificate
from tierloom.pipeline.serve.object_store import ObjectStore
from tierloom.pipeline.serve.terms import Terms
from tierloom.stages.errors import Closed, ConfigError
from tierloom.stages.options import masked
from tierloom.stages.tiers.server.client import TOKEN, read_token

if TYPE_CHECKING:
    from tierloom.adapters.door.http_door import HttpDoor
    from tierloom.pipeline.admin.store_admin import StoreAdmin
    from tierloom.stages.directory.shared.hosted import DirectoryHost

log = logging.getLogger("tierloom.serve")

_WINDOW = 64 << 20


class Serving:
    """A store and its listener; `run` is its whole life."""

    def __init__(
        self, spec: PipelineSpec, listens: Sequence[Listen], *, token: bytes = b"",
        context: ssl.SSLContext | None = None, clients: int = 512, drain: float = 10.0,
        host: DirectoryHost | None = None,
    ) -> None:  # fmt: skip
        """`context`: TLS, for listeners that want it. `drain`: seconds that are left to what is
        under way when it is to end. `host`: of a directory. Raises ConfigError."""
        if not spec.tiers:
            raise ConfigError(f"{spec.source}: has no tiers to serve")
        self._drain = drain
        self.store = ObjectStore(spec, shared=any(listen.path for listen in listens))
        window = min(_WINDOW, self.store.largest)
        terms = Terms(
            token, secrets.token_bytes(16), window, self.store.kept_in_memory // 4,
            host=host,
        )  # fmt: skip
        self.listener = Listener(self.store, listens, terms, context=context, clients=clients)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._admin: StoreAdmin | None = None

    def stats(self) -> dict[str, Any]:
        """Counters, as `ObjectStore.stats`; and how many clients there are."""
        serve = {"serve": {"clients": len(self.listener.sessions)}}
        drains = self._admin is not None and self._admin.drains
        return self.store.stats() | serve | ({"draining": True} if drains else {})

    async def run(self, started: Callable[[list[str]], None], stop: anyio.Event) -> None:
        """Serve until `stop`, then shut down in order. `started` is called with the addresses."""
        with contextlib.closing(self.listener):
            where = self.listener.bind()
            try:
                await self.store.open()
                self._loop = asyncio.get_running_loop()
                async with anyio.create_task_group() as tasks:
                    self.store.start(tasks)
                    started(where)
                    await self.listener.run(tasks, stop)
                    with anyio.move_on_after(self._drain):
                        await self.listener.gone()
                        await self.store.settled()
                    tasks.cancel_scope.cancel()
            finally:
                with anyio.CancelScope(shield=True):
                    await self.store.close()

    async def order(self, name: str, said: Mapping[str, Any]) -> dict[str, Any]:
        """Give the tiers an order, from the door's loop. Raises InputError, Closed."""
        if self._loop is None:
            raise Closed("its tiers are not open yet")
        if self._admin is None:
            self._admin = self._new_admin(self._loop)
        answer: dict[str, Any] = await awaited(self._admin.begin(name, said))
        return answer

    def _new_admin(self, loop: asyncio.AbstractEventLoop) -> StoreAdmin:
        from tierloom.pipeline.admin.store_admin import StoreAdmin
        from tierloom.pipeline.admin.whose import StoredNames

        async def halt() -> None:
            with anyio.move_on_after(self._drain):
                await self.store.settled()

        def under_way() -> dict[str, int]:
            writing = self.store.stats()["store"]["writing"]
            return {"clients": len(self.listener.sessions), "writing": writing}

        begin = partial(asyncio.run_coroutine_threadsafe, loop=loop)
        tiers = {tier.name: tier for tier in self.store.tiers}
        return StoreAdmin(tiers, StoredNames(), begin, halt=halt, under_way=under_way)


def run_serve(
    config: str, urls: Sequence[str], *, token_file: str, cert: Path | None, key: Path | None,
    without_token: bool, clients: int, drain: float, directory: str, http: str, log_level: str,
    log_format: str, say: Callable[[str], None],
) -> None:  # fmt: skip
    """What the command does, until SIGTERM or SIGINT; SIGHUP has it read token and certificate
    anew. Raises ConfigError."""
    from tierloom.pipeline.config.load import load_config

    listens = [Listen.at(url) for url in urls]
    token = read_token(token_file)
    for listen in listens:
        _check(listen, token, without_token=without_token)
    if (cert is None) != (key is None):
        raise ConfigError("--cert and --key go together")
    write_log(log_level, log_format)
    files = (cert, key) if cert is not None and key is not None else None
    context = certificate(*files) if files else None
    serving = Serving(
        load_config(config), listens, token=token, context=context, clients=clients, drain=drain,
        host=_host(directory) if directory else None,
    )  # fmt: skip
    door = _door(http, serving, token_file, cert, key) if http else None
    warn_of_access(listens, token, token_file)
    notice = ServiceNotice()

    def started(where: list[str]) -> None:
        if door is not None:
            serving.store.measure()
        if serving.store.spec.budget.touch:
            serving.store.arena.touch_ahead()
        say_what_is_kept(serving.store)
        for url in where:
            say(f"listening on {url}")
        if door is not None:
            say(f"listening on {door.url}")
        notice.tell("READY=1")

    def renew() -> None:
        try:
            fresh = read_token(token_file)
            if files is not None:
                certificate(*files)  # both, before one of them is replaced
            for listen in listens:
                _check(listen, fresh, without_token=without_token)
            if context is not None and files is not None:
                context.load_cert_chain(*files)
            if door is not None:
                door.renew()
        except (ConfigError, OSError) as error:
            log.error("SIGHUP: %s; token and certificate are those of before", error)  # noqa: TRY400
            return
        serving.listener.renew(fresh)
        log.info("SIGHUP: token and certificate were read anew; new connections go by them")

    failed: list[ConfigError] = []

    async def main() -> None:
        stop = anyio.Event()
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:

            async def watch() -> None:
                async for number in signals:
                    if number == signal.SIGHUP:
                        renew()
                        continue
                    notice.tell("STOPPING=1")
                    if door is not None:
                        door.draining = "it is about to end"
                    stop.set()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch)
                tasks.start_soon(notice.stay_alive)
                try:
                    await serving.run(started, stop)
                except ConfigError as error:
                    failed.append(error)
                tasks.cancel_scope.cancel()

    with door.start() if door is not None else contextlib.nullcontext():
        anyio.run(main)
    if failed:
        raise failed[0]


def _check(listen: Listen, token: bytes, *, without_token: bool) -> None:
    """Raises ConfigError."""
    if not listen.is_local and not token and not without_token:
        raise ConfigError(
            f"--listen {listen} can be reached from other hosts: name a "
            f"--token-file, or set {TOKEN}; or pass --without-token"
        )


def _door(
    http: str, serving: Serving, token_file: str, cert: Path | None, key: Path | None
) -> HttpDoor:  # fmt: skip
    """Raises ConfigError, MissingPackage."""
    from tierloom.adapters.door.entrance import Entrance
    from tierloom.adapters.door.http_door import HttpDoor

    async def read() -> dict[str, Any]:
        return {"store": serving.stats()}

    async def act(order: str, said: Mapping[str, Any], id: str) -> dict[str, Any]:
        return {"store": await serving.order(order, said)}

    return HttpDoor(read, Entrance(http, token_file=token_file, cert=cert, key=key), act)


def _host(directory: str) -> DirectoryHost:
    """Raises ConfigError."""
    from tierloom.stages.directory.shared.hosted import DirectoryHost
    from tierloom.stages.directory.shared.named import EMBEDDED, named_directory

    if directory != EMBEDDED:
        raise ConfigError(f"--directory {masked(directory)}: write --directory {EMBEDDED}")
    return DirectoryHost(named_directory(EMBEDDED))
