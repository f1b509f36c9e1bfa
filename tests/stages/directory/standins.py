"""Directories that lose their answers, or all they know; and the door of one that is hosted."""

from __future__ import annotations

from contextlib import asynccontextmanager

import anyio

from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.serve.listener import Listen, Listener
from tierloom.pipeline.serve.object_store import ObjectStore
from tierloom.pipeline.serve.terms import Terms
from tierloom.stages.directory.shared.contract import Directory
from tierloom.stages.directory.shared.hosted import DirectoryHost
from tierloom.stages.errors import TierDown

CALLS = ("join", "leave", "beat", "announce", "find", "report", "workers", "sweep")


class Frail(Directory):
    """A directory before another one. `before` and `after`: how many of the next calls fail before
    they are made, or lose their answer."""

    def __init__(self, inner):
        self.inner = inner
        self.before = self.after = 0
        self.calls = []

    async def _call(self, name, *args, **options):
        self.calls.append(name)
        if self.before:
            self.before -= 1
            raise TierDown("it is down")
        answer = await getattr(self.inner, name)(*args, **options)
        if self.after:
            self.after -= 1
            raise TierDown("its answer is lost")
        return answer


def _passed_on(name):
    async def call(self, *args, **options):
        return await self._call(name, *args, **options)

    return call


for _name in CALLS:
    setattr(Frail, _name, _passed_on(_name))
Frail.__abstractmethods__ = frozenset()


STORE = {
    "version": 1, "name": "store", "budget": {"arena": "1 MiB"},
    "tiers": {"hot": {"use": "memory", "capacity": "1 MiB"}}, "graphs": {},
}  # fmt: skip
SCHEMES = {"tcp": "directory", "tls": "directory+tls", "unix": "directory+unix"}


@asynccontextmanager
async def hosting(directory, *, at="tcp://127.0.0.1:0", token=b"", context=None):
    """Its host, and the URL of a listener; `directory` None: one without."""
    host = DirectoryHost(directory) if directory is not None else None
    store, terms = ObjectStore(load_config(STORE)), Terms(token, b"e" * 16, 0, 0, host=host)
    listener = Listener(store, [Listen.at(at)], terms, context=context)
    (url,) = listener.bind()
    scheme, _, rest = url.partition("://")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.run, tasks, anyio.Event())
        yield host, f"{SCHEMES[scheme]}://{rest}"
        tasks.cancel_scope.cancel()
    listener.close()
    await store.close()
