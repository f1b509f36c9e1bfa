"""peer: what other engines keep, read out of their own tiers. Nothing is put there.

    near: {use: peer, directory: ["10.0.0.2:7655", "10.0.0.3:7655"], timeout: 200 ms, hedge: 30 ms}

Those are engines whose files say `serve:`. All of them are asked at once which of a prompt's chunks
they have, and each chunk is read from one that has it: from the quickest, and from the next one
when that is slow. Bytes come by the serve protocol (docs/protocol.md), and are verified like those
of any other remote tier. An engine that is dead, stopped or cut off costs one time limit.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import anyio

from tierloom.stages.errors import ConfigError, Lost
from tierloom.stages.kv.object import Object
from tierloom.stages.tiers.contract.hedge import race
from tierloom.stages.tiers.contract.tier import Read, Tier, TierContext, TierStat, require_sealed
from tierloom.stages.tiers.landing.options import use_nixl
from tierloom.stages.tiers.peers.directory import AskAll, HolderDirectory
from tierloom.stages.tiers.peers.holder import Holder
from tierloom.stages.tiers.peers.options import PeerOptions, url_of
from tierloom.stages.tiers.server.tier import ServerOptions

if TYPE_CHECKING:
    from tierloom.stages.tiers.landing.receiver import Receiver
    from tierloom.stages.tiers.peers.borrowed import Borrowed

log = logging.getLogger(__name__)

_KNOWN, _FRESH = 1 << 14, 10.0
"""Keys whose holders are remembered, and seconds for which they are."""
_MANY = 64
"""Engines that a directory has named, from which on those that are left alone are forgotten."""


class Peer(Tier):
    """Reads from the engines of a list. For asyncio."""

    Options = PeerOptions
    read_only = True

    def __init__(self, options: PeerOptions, ctx: TierContext) -> None:
        super().__init__(ctx)
        self.options = options
        self.holders: dict[str, Holder] = {}
        """By address."""
        self._addresses: dict[Holder, str] = {}
        self._directory: HolderDirectory = AskAll(self.holders, options.hedge)
        self._known: dict[bytes, tuple[float, list[Holder]]] = {}
        self._came: dict[bytes, Holder] = {}
        """From whom the objects of the last keys came."""
        self._size = 0
        """Bytes of the last object that came."""
        self.receiver: Receiver | None = None
        """Where objects land that come by NIXL."""
        self._watcher: asyncio.Task[None] | None = None
        self._sender: asyncio.Task[None] | None = None
        self.borrowed: Borrowed | None = None
        """What memory evicted here and others keep; None: nothing of it."""
        self._woken = asyncio.Event()

    async def open(self) -> None:
        """Dials nobody: that is done in the background. Raises ConfigError."""
        if not self.ctx.namespace:
            raise ConfigError("peer: this tier needs a namespace")
        if use_nixl(self.options.wire):
            from tierloom.stages.tiers.landing.receiver import Receiver

            o = self.options
            self.receiver = Receiver(o.landing, self.ctx.namespace, o.nixl.backend, o.nixl.options)
        if self.options.looks_up:
            from tierloom.stages.tiers.peers.looked_up import LookedUp

            self._directory = LookedUp.named(self.options, self.ctx.namespace)
        for address in () if self.options.looks_up else self.options.addresses:
            self._holder(address)
        if self.options.borrow and self.ctx.given_up is not None:
            from tierloom.stages.tiers.peers.borrowed import Borrowed

            o = self.options
            self.borrowed = Borrowed(o.borrow, o.timeout, self.ctx.arena, self._lenders)
            self.ctx.given_up.append(self.borrowed.offer)
            self._sender = asyncio.create_task(self.borrowed.run())
            self._sender.add_done_callback(_say_why)
        self._watcher = asyncio.create_task(self._watch())
        self._watcher.add_done_callback(_say_why)

    async def close(self) -> None:
        tasks = [task for task in (self._watcher, self._sender) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.receiver is not None:  # before the connections, by which nothing is then due
            await self.ctx.pool(self.receiver.close, leases=())
        for holder in self.holders.values():
            await holder.close()
        await self._directory.close()

    @property
    def healthy(self) -> list[Holder]:
        """Engines that may be asked."""
        return [holder for holder in self.holders.values() if holder.healthy]

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        found = await self._directory.holders(keys) if keys else []
        until = time.monotonic() + _FRESH
        for key, addresses in zip(keys, found, strict=True):
            self._known.pop(key, None)
            if addresses:
                self._known[key] = until, [h for a in addresses if (h := self._holder_at(a))]
        _trim(self._known)
        await self._forget_some()
        return [bool(addresses) for addresses in found]

    async def read(self, reads: Sequence[Read]) -> None:
        fresh = [read for read in reads if read.object is None]
        now = time.monotonic()
        unknown = [r.key for r in fresh if self._known.get(r.key, (0.0, []))[0] < now]
        if unknown:
            await self.exists(unknown)
        await self._further([read for read in reads if read.object is not None])
        asked: dict[int, list[Holder]] = {id(read): [] for read in fresh}
        while fresh:
            groups: dict[tuple[Holder, ...], list[Read]] = {}
            for read in fresh:
                if best := tuple(self._best(read.key, asked[id(read)]))[:2]:
                    groups.setdefault(best, []).append(read)
                elif read.lost is None:
                    self._miss(read)
            async with anyio.create_task_group() as tasks:
                for holders, group in groups.items():
                    tasks.start_soon(self._from, holders, group, asked)
            fresh = [r for group in groups.values() for r in group if r.object is None]

    async def put(self, objects: Sequence[Object]) -> list[Lost | None]:
        """Refused: each engine keeps its own."""
        require_sealed(*objects)
        self.counts.refused += len(objects)
        return [Lost.NO_ROOM] * len(objects)

    async def delete(self, keys: Sequence[bytes]) -> int:
        """Nothing is deleted. What was read of these is not asked for again there for a while."""
        for key in keys:
            if (holder := self._came.pop(key, None)) is not None:
                holder.shun(key, Lost.CORRUPT)
            self._known.pop(key, None)
        return 0

    async def clear(self) -> int:
        """What others keep is theirs, but for what was put there."""
        return await self.borrowed.clear() if self.borrowed is not None else 0

    def stat(self) -> TierStat:
        """Nothing: each engine counts its own."""
        return TierStat(0, 0, 0)

    def _holder(self, address: str) -> Holder:
        """Raises ConfigError."""
        if address not in self.holders:
            o = self.options
            options = ServerOptions(
                url=url_of(address), token_file=o.token_file, ca_file=o.ca_file,
                connections=o.connections, share=False,
            )  # fmt: skip
            self.holders[address] = Holder(
                options, self.ctx, self.counts, limit=o.timeout, probe=o.probe,
                wake=self._woken.set, borrows=o.borrow > 0,
            )  # fmt: skip
            if self.receiver is not None and (o.wire == "nixl" or not options.encrypted):
                least = 1 if o.wire == "nixl" else o.nixl.min_bytes
                self.holders[address].land_in(self.receiver, least)
            self._addresses[self.holders[address]] = address
        return self.holders[address]

    def _holder_at(self, address: str) -> Holder | None:
        """The same for an address that somebody else says; None: it is none."""
        try:
            return self._holder(address)
        except (ConfigError, ValueError):
            return None

    async def _lenders(self) -> list[Holder]:
        addresses = await self._directory.lenders()
        return [holder for a in addresses if (holder := self._holder_at(a)) is not None]

    async def _forget_some(self) -> None:
        """Engines come and go where a directory names them: those that are left alone are closed
        when there are very many."""
        if not self.options.looks_up or len(self.holders) <= _MANY:
            return
        for address, holder in list(self.holders.items()):
            if not holder.healthy and not holder.busy:
                del self.holders[address], self._addresses[holder]
                await holder.close()

    def _best(self, key: bytes, asked: list[Holder]) -> Iterator[Holder]:
        """Those who have an object and were not asked for it yet, quickest first."""
        _, holders = self._known.get(key, (0.0, []))
        left = (h for h in holders if h.healthy and h not in asked)
        yield from sorted(left, key=lambda holder: holder.rank)

    async def _from(
        self, holders: tuple[Holder, ...], group: list[Read], asked: dict[int, list[Holder]]
    ) -> None:
        """Read a group from the first of two holders, or the second where that is slow."""
        tries: dict[Holder, list[Read]] = {}
        need = len(group) * self._size
        with ExitStack() as untaken:

            async def ask(holder: Holder) -> bool:
                tries[holder] = mine = [Read(read.key, read.upto) for read in group]
                untaken.callback(_release, mine)
                for read in group:
                    asked[id(read)].append(holder)
                await holder.fetch(mine)
                return all(each.object is not None and each.lost is None for each in mine)

            async def ask_second() -> bool:
                """It needs memory that nobody was promised; without, the first makes room for it,
                and it is asked in the next round."""
                if not need or not self.ctx.arena.promises.try_reserve(need):
                    return True
                untaken.callback(self.ctx.arena.promises.unreserve, need)
                return await ask(holders[1])

            if self.options.hedge is None or len(holders) == 1:
                await ask(holders[0])
            else:
                should = holders[0].cost.of(need) or 0.0
                await race(lambda: ask(holders[0]), ask_second, self.options.hedge + should)
            for i, read in enumerate(group):
                self._take(read, {holder: mine[i] for holder, mine in tries.items()})

    def _take(self, read: Read, tries: dict[Holder, Read]) -> None:
        """Give a read what came first of what was asked for it."""
        read.lost = Lost.LATE
        for holder, each in tries.items():
            if each.object is not None and each.lost is None:
                read.object, each.object, read.lost = each.object, None, None
                read.object.source = holder
                self._size = read.object.header.nbytes
                if read.upto:  # a header alone is asked for to compare it
                    self._came.pop(read.key, None)
                    self._came[read.key] = holder
                    _trim(self._came)
                return
            if each.lost is Lost.ABSENT:
                self._directory.missed(read.key, self._addresses.get(holder, ""))
            # That one engine has what cannot be read here says nothing of what others have.
            bad = each.lost is not None and each.lost.unreadable
            read.lost = Lost.ABSENT if bad else each.lost or Lost.LATE

    async def _further(self, reads: Sequence[Read]) -> None:
        """More frames of objects whose first have come, from where those came."""
        by_holder: dict[Holder, list[Read]] = {}
        for read in reads:
            holder = read.object.source if read.object is not None else None
            if isinstance(holder, Holder) and holder.healthy:
                by_holder.setdefault(holder, []).append(read)
            else:
                read.lost = Lost.TIER_DOWN
        async with anyio.create_task_group() as tasks:
            for holder, group in by_holder.items():
                tasks.start_soon(holder.fetch, group)

    def _miss(self, read: Read) -> None:
        read.lost = Lost.ABSENT if self.healthy else Lost.TIER_DOWN
        self.counts.misses += read.lost is Lost.ABSENT

    async def _watch(self) -> None:
        """Look for engines that were put aside, and at the start for all."""
        due = list(self.holders.values())
        while True:
            async with anyio.create_task_group() as tasks:
                for holder in due:
                    tasks.start_soon(holder.look)
            self._woken.clear()
            waits = [w for h in self.holders.values() if (w := h.waits) is not None]
            with anyio.move_on_after(min(waits) if waits else None):
                await self._woken.wait()
            due = [h for h in self.holders.values() if h.waits == 0]


def _say_why(watcher: asyncio.Task[None]) -> None:
    if not watcher.cancelled() and (error := watcher.exception()) is not None:
        log.error("the tier peer works no more as it should", exc_info=error)


def _release(reads: Sequence[Read]) -> None:
    for read in reads:
        if read.object is not None:
            read.object.lease.release()
            read.object = None


def _trim(known: dict[bytes, Any]) -> None:
    while len(known) > _KNOWN:
        del known[next(iter(known))]
