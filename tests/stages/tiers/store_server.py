"""`tierloom serve` as a process of its own on a free port, and in this process where a test must
reach into the server's memory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import processes

from tierloom.adapters.server.serve import Serving
from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.serve.listener import Listen

if TYPE_CHECKING:
    from collections.abc import Iterator

MEMORY: dict[str, Any] = {"hot": {"use": "memory", "capacity": "64 MiB"}}


def config(tiers: dict[str, Any] | None = None, arena: str = "64 MiB") -> dict[str, Any]:
    return {
        "version": 1, "name": "test", "budget": {"arena": arena}, "tiers": tiers or MEMORY,
        "graphs": {},
    }  # fmt: skip


class Process(processes.Process):
    """A server that runs until `stop` or `kill`; it says itself where it listens."""

    def __init__(
        self, folder: Path, *options: str, tiers: dict[str, Any] | None = None,
        listen: tuple[str, ...] = ("tcp://127.0.0.1:0",), arena: str = "64 MiB",
        env: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "serve.yaml"
        file.write_text(json.dumps(config(tiers, arena)))
        serve = [sys.executable, "-m", "tierloom.adapters.cli", "serve", "--config", str(file)]
        self.listens = list(listen)
        safe = {"PYTHONSAFEPATH": "1"} | (env or {})
        super().__init__([*serve, *options], 0, folder / "serve.log", safe)

    def start(self) -> None:
        """Started again, it listens where it did."""
        listen = [word for url in self.listens for word in ("--listen", url)]
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                [*self.command, *listen], stdout=subprocess.PIPE, stderr=log, text=True,
                env=self._env, preexec_fn=processes.die_with_parent,
            )  # fmt: skip
        assert self.child.stdout is not None
        with self.child.stdout as out:  # it says nothing else
            said = [out.readline() for _ in self.listens]
        assert all(line.startswith("listening on ") for line in said), (said, self.log.read_text())
        self.listens = [line.split()[-1] for line in said]

    @property
    def urls(self) -> list[str]:
        """As a client writes them."""
        return [client_url(url) for url in self.listens]

    @property
    def url(self) -> str:
        return self.urls[0]


@contextmanager
def process(folder: Path, *options: str, **more: Any) -> Iterator[Process]:
    server = Process(folder, *options, **more)
    try:
        yield server
    finally:
        server.kill()


class Within:
    """A server on a thread of this process, in whose memory a test may do damage."""

    def __init__(self, path: Path, **options: Any) -> None:
        self._ready = threading.Event()
        self._listens = [Listen.at("tcp://127.0.0.1:0"), Listen.at(f"unix://{path}")]
        spec = load_config(config(options.pop("tiers", None), options.pop("arena", "64 MiB")))
        self.serving = Serving(spec, self._listens, **options)
        self.urls: list[str] = []
        self._thread = threading.Thread(target=anyio.run, args=[self._main], daemon=True)
        self._thread.start()
        assert self._ready.wait(20)

    async def _main(self) -> None:
        self._stop = anyio.Event()
        self._token = anyio.lowlevel.current_token()

        def started(where: list[str]) -> None:
            self.urls = [client_url(url) for url in where]
            self._ready.set()

        await self.serving.run(started, self._stop)

    def call(self, fn: Any, *args: Any) -> Any:
        """Run a coroutine on the server's loop."""
        return anyio.from_thread.run(fn, *args, token=self._token)

    def stop(self) -> None:
        anyio.from_thread.run_sync(self._stop.set, token=self._token)
        self._thread.join(20)
        assert not self._thread.is_alive()


def client_url(url: str) -> str:
    scheme, rest = url.split("://")
    return (
        {"tcp": "tierloom", "tls": "tierloom+tls", "unix": "tierloom+unix"}[scheme] + "://" + rest
    )
