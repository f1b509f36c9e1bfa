"""Common part of tiers that keep objects in a shared memory pool, piece by piece.

An object is split into *pieces* that never cross the end of a header or frame, each under a name of
its own. When the last of them is there its *manifest* is put: a few bytes that list the pieces. An
object without a manifest is not there, so an object is seen whole or not at all. The names of
pieces carry a random number of their writer, so that two writers of one key never mix. A pool
evicts pieces one by one: an object that lacks one is a miss, and is deleted.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack

from tierloom.stages.errors import BadObject, Damaged, Lost, TierDown
from tierloom.stages.kv.object import Header, Object
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.memory.arena import Lease
from tierloom.stages.tiers.contract.object_reader import ObjectReader
from tierloom.stages.tiers.contract.tier import Read, SharedTier, TierContext, require_sealed
from tierloom.stages.tiers.pools.bounded_calls import BoundedCalls
from tierloom.stages.tiers.pools.jobs import (
    HeaderAtHand,
    LoadJob,
    header_at_hand,
    job_of,
    manifest_for,
    manifest_of,
)
from tierloom.stages.tiers.pools.manifest import Manifest, Piece


class Pooled(SharedTier):
    """Whole chunks only: inner links are found in local tiers.

    Subclasses say how values are stored. Their methods block, free the GIL, may be called from
    several threads, and raise TierDown or OSError.
    """

    def __init__(self, ctx: TierContext, *, threads: int, piece: int) -> None:
        """`threads`: calls that may run at once. `piece`: bytes of a piece at most."""
        super().__init__(ctx)
        self.piece = piece
        self._calls = BoundedCalls(ctx.pool, threads, self.counts)
        self._committing = threading.Lock()

    @abstractmethod
    def _exists(self, names: Sequence[str]) -> list[bool]: ...

    @abstractmethod
    def _peek(self, names: Sequence[str]) -> list[bytes | None]:
        """Small values; None for each that is absent, empty for one that is not small."""

    @abstractmethod
    def _fetch(self, pieces: Sequence[Piece]) -> list[Lost | None]:
        """Read into memory; None for each that came with the expected length."""

    @abstractmethod
    def _store(self, pieces: Sequence[Piece]) -> list[Lost | None]: ...

    @abstractmethod
    def _commit(self, manifests: dict[str, bytes]) -> list[Lost | None]:
        """Put small values, each at once whole."""

    @abstractmethod
    def _remove(self, names: Sequence[str]) -> list[bool]:
        """Which of them were there."""

    @abstractmethod
    def _wipe(self) -> int:
        """Forget all of the namespace; how many manifests there were."""

    def _uncertain(self, leases: Sequence[Lease]) -> None:
        """Transfers into or out of these failed: hold them while the client may still use them."""

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        if not keys:
            return []
        names = [key.hex() for key in keys]
        found: list[bool] = await self._calls(self._exists, names, leases=())
        return found

    async def read(self, reads: Sequence[Read]) -> None:
        if not reads:
            return
        heads = [header_at_hand(read.object) for read in reads]
        known = await self._calls(self._known, [read.key for read in reads], heads, leases=())
        with ExitStack() as stack:
            readers = [ObjectReader(read, self.ctx.arena, self.counts) for read in reads]
            for reader in readers:
                stack.callback(reader.close)
            both = zip(readers, known, strict=True)
            jobs = [
                job for reader, manifest in both if (job := job_of(reader, manifest)) is not None
            ]
            if jobs:
                leases = [job.lease for job in jobs]
                loaded = await self._calls(self._load, jobs, leases=leases)
                for job, got in zip(jobs, loaded, strict=True):
                    if isinstance(got, Header):
                        job.reader.deliver(got, job.last - 1)
                    else:
                        job.reader.fail(got)

    async def put(self, objects: Sequence[Object]) -> list[Lost | None]:
        require_sealed(*objects)
        if not objects:
            return []
        leases = [obj.lease for obj in objects]
        written: list[int | Lost] = await self._calls(self._save, list(objects), leases=leases)
        for one in written:
            self.counts.refused += isinstance(one, Lost)
            self.counts.puts += not isinstance(one, Lost) and one > 0
            self.counts.bytes_in += 0 if isinstance(one, Lost) else one
        return [one if isinstance(one, Lost) else None for one in written]

    async def delete(self, keys: Sequence[bytes]) -> int:
        return int(await self._calls(self._drop, list(keys), leases=())) if keys else 0

    async def clear(self) -> int:
        cleared = int(await self._calls(self._wipe, leases=()))
        self._holdings.reset()
        return cleared

    # What follows runs in the pool's threads.

    def _known(
        self, keys: list[bytes], heads: list[HeaderAtHand | None]
    ) -> list[Manifest | Lost | BadObject]:
        """The manifest of each; ABSENT, too, where it is no longer that of the object at hand, by
        which bytes would land beside their place, or beyond the lease."""
        raws = self._peek([key.hex() for key in keys])
        found = [manifest_of(raw) for raw in raws]
        rows = zip(keys, raws, found, strict=True)
        self._expel([(key, raw, proof) for key, raw, proof in rows if isinstance(proof, Damaged)])
        names: dict[int, str] = {}
        for i, (manifest, held) in enumerate(zip(found, heads, strict=True)):
            if held is not None and isinstance(manifest, Manifest):
                if manifest.boundaries == held.boundaries:
                    names[i] = manifest.names(keys[i], PAGE, 0, 1)[0][0]
                else:
                    found[i] = Lost.ABSENT
        for i, now in zip(names, self._peek(list(names.values())) if names else (), strict=True):
            held = heads[i]
            if held is None or now != held.page:
                found[i] = Lost.ABSENT
        return found

    def _load(self, jobs: list[LoadJob]) -> list[Header | Lost | BadObject]:
        pieces, owners = [], []
        for i, job in enumerate(jobs):
            for name, at, size in job.manifest.names(job.key, self.piece, job.first, job.last):
                pieces.append(Piece(name, job.lease.at(at, size), size))
                owners.append((at, i))
        order = sorted(range(len(pieces)), key=owners.__getitem__)
        lost: dict[int, Lost] = {}
        try:
            outcomes = self._fetch([pieces[n] for n in order])
        except BaseException:
            self._uncertain([job.lease for job in jobs])
            raise
        for n, outcome in zip(order, outcomes, strict=True):
            i = owners[n][1]
            if outcome is not None and lost.get(i) is not Lost.TIER_DOWN:
                lost[i] = outcome
        self._uncertain([jobs[i].lease for i, one in lost.items() if one is Lost.TIER_DOWN])
        if lost and len(lost) == len(jobs) and set(lost.values()) == {Lost.TIER_DOWN}:
            raise TierDown("no piece could be read")
        return [self._checked(job, lost.get(i)) for i, job in enumerate(jobs)]

    def _checked(self, job: LoadJob, lost: Lost | None) -> Header | Lost | BadObject:
        """The header of what was loaded. What is damaged or lacks a piece is forgotten."""
        proof = Damaged("a piece of it was evicted, or is of another length")
        if lost is None:
            try:
                header = Header.unpack(job.lease.view, key=job.key, namespace=self.ctx.namespace)
            except Damaged as error:
                proof = error
            except BadObject as error:
                return error
            else:
                if header.boundaries == job.manifest.boundaries:
                    return header
                proof = Damaged("its manifest and its header contradict each other")
        if lost in (None, Lost.ABSENT, Lost.CORRUPT):
            self._expel([(job.key, job.manifest.pack(), proof)])
        return proof if lost in (None, Lost.CORRUPT) else lost

    def _expel(self, bad: Sequence[tuple[bytes, bytes | None, Damaged]]) -> None:
        """Delete objects on proof of damage, unless their manifest is no longer the one that was
        read."""
        if bad:
            now = self._peek([key.hex() for key, _, _ in bad])
            same = [(key, raw) for (key, raw, _), one in zip(bad, now, strict=True) if one == raw]
            self._forget([(key, manifest_of(raw)) for key, raw in same])

    def _save(self, objects: list[Object]) -> list[int | Lost]:
        """Bytes written of each: 0 when it is there already."""
        done: list[int | Lost] = [0] * len(objects)
        keys = [obj.header.key for obj in objects]
        there = self._exists([key.hex() for key in keys])
        fresh = {key: i for i, key in enumerate(keys) if not there[i]}
        manifests = {key: manifest_for(objects[i]) for key, i in fresh.items()}
        pieces, owners = [], []
        for key, i in fresh.items():
            for name, at, size in manifests[key].names(key, self.piece):
                pieces.append(Piece(name, objects[i].lease.at(at, size), size))
                owners.append(key)
        stored: Sequence[Lost | None] = ()
        try:
            stored = self._store(pieces) if pieces else ()
        except BaseException:
            self._uncertain([objects[i].lease for i in fresh.values()])
            raise
        failed = {key for key, one in zip(owners, stored, strict=True) if one is Lost.TIER_DOWN}
        self._uncertain([objects[fresh[key]].lease for key in failed])
        for key, lost in zip(owners, stored, strict=True):
            if lost is not None:
                done[fresh[key]] = lost
        whole = [key for key, i in fresh.items() if done[i] == 0]
        with self._committing:  # the second writer deletes its pieces, and replaces nothing
            late = self._exists([key.hex() for key in whole]) if whole else []
            mine = [key for key, there in zip(whole, late, strict=True) if not there]
            packed = {key.hex(): manifests[key].pack() for key in mine}
            for key, lost in zip(mine, self._commit(packed) if mine else (), strict=True):
                done[fresh[key]] = objects[fresh[key]].header.nbytes if lost is None else lost
        useless = [key for key, i in fresh.items() if isinstance(done[i], Lost) or not done[i]]
        self._clean([(key, manifests[key]) for key in useless])
        sizes = [one for one in done if not isinstance(one, Lost) and one]
        self._holdings.add(len(sizes), sum(sizes))
        return done

    def _drop(self, keys: list[bytes]) -> int:
        raws = self._peek([key.hex() for key in keys])
        return self._forget([(k, manifest_of(raw)) for k, raw in zip(keys, raws, strict=True)])

    def _forget(self, found: Sequence[tuple[bytes, object]]) -> int:
        """Delete manifests, then their pieces; how many manifests there were."""
        gone = self._remove([key.hex() for key, _ in found])
        known = [(key, manifest) for key, manifest in found if isinstance(manifest, Manifest)]
        self._clean(known)
        there = [r for (_, r), was in zip(found, gone, strict=True) if was]
        sizes = [r.boundaries[-1] for r in there if isinstance(r, Manifest)]
        self._holdings.add(-len(sizes), -sum(sizes))
        return sum(gone)

    def _clean(self, found: list[tuple[bytes, Manifest]]) -> None:
        names = [name for key, r in found for name, _, _ in r.names(key, self.piece)]
        if names:
            self._remove(names)
