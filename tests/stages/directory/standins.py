"""Directories that lose their answers, or all they know."""

from __future__ import annotations

from tierloom.stages.directory.shared.contract import Directory
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
