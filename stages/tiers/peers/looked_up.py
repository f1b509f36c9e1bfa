"""Which engine has what, as a directory says that all of them tell."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from tierloom.stages.directory.shared.contract import Directory, Roster
from tierloom.stages.directory.shared.named import named_directory
from tierloom.stages.directory.shared.records import ChunkHolder, chunk_name
from tierloom.stages.errors import ConfigError, TierDown
from tierloom.stages.tiers.memory.lent import LENT
from tierloom.stages.tiers.peers.options import PeerOptions

log = logging.getLogger(__name__)

_ASKED = 512
"""Chunks of one question."""
_REPORTS = 64
"""Reports under way, at most; more are dropped: who asks next makes them."""
_REMEMBERED = 1 << 14
_REST = 1.0
"""Seconds for which a directory that failed is asked by nobody."""
_FRESH = 5.0
"""Seconds for which those that lend are not asked for again."""


class LookedUp:
    """A `HolderDirectory`. What it says is a hint: a chunk that is gone is a miss, and reported."""

    def __init__(self, directory: Directory, namespace: bytes) -> None:
        self._directory, self._namespace = directory, namespace
        self._roster = Roster(directory)
        self._named: dict[tuple[bytes, str], ChunkHolder] = {}
        """By key and address: as `find` named them last."""
        self._reports: set[asyncio.Task[None]] = set()
        self._silent, self._retry = False, 0.0
        self._lend: list[str] = []
        self._lend_until = 0.0

    @classmethod
    def named(cls, options: PeerOptions, namespace: bytes) -> LookedUp:
        """By the directory that options name. Raises ConfigError."""
        o, url = options, options.directory[0].strip()
        made = named_directory(url, timeout=o.timeout, token_file=o.token_file, ca_file=o.ca_file)
        return cls(made, namespace)

    async def holders(self, keys: Sequence[bytes]) -> list[list[str]]:
        """Of the longest prefix of `keys` that somebody has. Never raises."""
        now = time.monotonic()
        if self._silent and now < self._retry:
            return [[] for _ in keys]
        self._retry = now + _REST  # one call finds out; the others go on without
        try:
            found = await self._find(keys)
        except (ConfigError, TierDown, OSError, TimeoutError) as error:
            if not self._silent:
                log.warning("the directory does not say what other engines keep: %s", error)
            self._silent = True
            return [[] for _ in keys]
        if self._silent:
            log.warning("the directory says again what other engines keep")
        self._silent = False
        return found

    async def lenders(self) -> list[str]:
        """Those that say so, and keep what this engine can read. Raises ConfigError, too."""
        now = time.monotonic()
        if now >= self._lend_until:
            workers = await self._directory.workers()
            records = [member.record for member in workers.values()]
            mine = self._namespace.hex()
            lend = [r for r in records if LENT in r.tiers and r.namespace == mine]
            self._lend = [address for r in lend for address in r.addresses]
            self._lend_until = now + _FRESH
        return self._lend

    def missed(self, key: bytes, address: str) -> None:
        """An engine that was named for a chunk did not have it. Returns at once."""
        holder = self._named.pop((key, address), None)
        if holder is None or len(self._reports) >= _REPORTS:
            return
        self._roster.forget(holder.number)
        task = asyncio.create_task(self._report(key, holder))
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)

    async def close(self) -> None:
        for task in self._reports:
            task.cancel()
        await asyncio.gather(*self._reports, return_exceptions=True)
        await self._directory.close()

    async def _find(self, keys: Sequence[bytes]) -> list[list[str]]:
        names = [chunk_name(self._namespace, key) for key in keys]
        found: list[tuple[ChunkHolder, ...]] = []
        for first in range(0, len(names), _ASKED):
            part = names[first : first + _ASKED]
            found += await self._directory.find(part)
            if len(found) < first + len(part):  # the prefix ends here
                break
        members = await self._roster.members(found)
        out: list[list[str]] = [[] for _ in keys]
        for key, holders, addresses in zip(keys, found, out, strict=False):
            for holder in holders:
                member = members.get(holder.number)
                for address in member.record.addresses if member is not None else ():
                    addresses.append(address)
                    self._named[key, address] = holder
        while len(self._named) > _REMEMBERED:
            del self._named[next(iter(self._named))]
        return out

    async def _report(self, key: bytes, holder: ChunkHolder) -> None:
        try:
            await self._directory.report(chunk_name(self._namespace, key), holder)
        except (TierDown, OSError, TimeoutError) as error:
            log.debug("a stale entry of the directory was not reported: %s", error)
