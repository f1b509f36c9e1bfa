"""`tierloom serve`: the tiers of a pipeline file as one store for many engines."""

from __future__ import annotations

import contextlib
import logging
import secrets
import signal
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from tierloom.pipeline.config.spec import PipelineSpec
from tierloom.pipeline.serve.listener import Listen, Listener, certificate
from tierloom.pipeline.serve.object_store import ObjectStore
from tierloom.pipeline.serve.terms import Terms
from tierloom.stages.errors import ConfigError
from tierloom.stages.options import masked
from tierloom.stages.tiers.server.client import TOKEN, read_token

if TYPE_CHECKING:
    from tierloom.stages.directory.shared.hosted import DirectoryHost

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

    async def run(self, started: Callable[[list[str]], None], stop: anyio.Event) -> None:
        """Serve until `stop`, then shut down in order. `started` is called with the addresses."""
        with contextlib.closing(self.listener):
            where = self.listener.bind()
            try:
                await self.store.open()
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


def run_serve(
    config: str, urls: Sequence[str], *, token_file: str, cert: Path | None, key: Path | None,
    without_token: bool, clients: int, drain: float, directory: str,
    say: Callable[[str], None],
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
        load_config(config), listens, token=token, context=context, clients=clients, drain=drain,
        host=_host(directory) if directory else None,
    )  # fmt: skip

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


def _host(directory: str) -> DirectoryHost:
    """Raises ConfigError."""
    from tierloom.stages.directory.shared.hosted import DirectoryHost
    from tierloom.stages.directory.shared.named import EMBEDDED, named_directory

    if directory != EMBEDDED:
        raise ConfigError(f"--directory {masked(directory)}: write --directory {EMBEDDED}")
    return DirectoryHost(named_directory(EMBEDDED))
