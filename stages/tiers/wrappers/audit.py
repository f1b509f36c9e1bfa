"""audit: another tier, with every call logged and every object checked on its way in and out.

    cold: {use: audit, of: {use: files, path: /mnt/kv}}

Finds out which store, network or disk is faulty. What differs from its checksums is stopped: on its
way in it is not stored, on its way out it is a miss. Differences are counted as `differ_in` and
`differ_out` in the tier's figures. It answers like a remote tier, by whole chunks, whatever it
wraps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import xxhash

from tierloom.stages.errors import BadObject, Damaged, Lost
from tierloom.stages.kv.object import Header, Object
from tierloom.stages.tiers.contract.object_reader import is_still
from tierloom.stages.tiers.contract.tier import Found, Inner, Read, Tier, TierContext
from tierloom.stages.tiers.contract.wrapper import WrapperTier

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditOptions:
    """Options of an audit tier."""

    of: Inner
    """The tier, written as any tier is."""

    def __post_init__(self) -> None:
        if self.of.cls.in_arena:
            cause = "keeps objects in place, so there are no transfers to check"
            raise ValueError(f"{self.of.use!r} {cause}")


class Audit(WrapperTier):
    """Logs and checks what passes."""

    Options = AuditOptions

    def __init__(self, options: AuditOptions, ctx: TierContext) -> None:
        self.use = options.of.use
        super().__init__(options.of.build(ctx._replace(watch=None)))

    def wrap(self, tier: Tier) -> None:
        super().wrap(tier)
        self.local = False
        self.counts.extra |= {"differ_in": 0, "differ_out": 0}

    def find(self, links: bytes) -> Found | None:
        raise NotImplementedError("audit answers by whole chunks, whatever it wraps")

    async def open(self) -> None:
        with self._logged("open"):
            await self.tier.open()

    async def close(self) -> None:
        with self._logged("close"):
            await self.tier.close()

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        with self._logged("has", len(keys)) as said:
            found = await self.tier.exists(keys)
            said.append(f"{sum(found)} are there")
        return found

    async def prefix_length(self, keys: Sequence[bytes]) -> int:
        with self._logged("has", len(keys)) as said:
            length = await self.tier.prefix_length(keys)
            said.append(f"the first {length} are there")
        return length

    async def read(self, reads: Sequence[Read]) -> None:
        before = [read.object.loaded if read.object else 0 for read in reads]
        fresh = [read.object is None for read in reads]
        with self._logged("read", len(reads)) as said:
            await self.tier.read(reads)
            said += [f"{read.key.hex()[:16]} {read.lost.name}" for read in reads if read.lost]
        for read, begin, new in zip(reads, before, fresh, strict=True):
            if read.object is None or read.lost is not None:
                continue
            made, args = read.object, (begin, read.key)
            cause = await self.ctx.pool(_difference, made, *args, leases=(made.lease,))
            if cause is None:
                continue
            self._differs("out", read.key, cause)
            read.refuse(cause)
            if new:
                read.object.lease.release()
                read.object = None
            if isinstance(cause, Damaged):
                await self._expel(read.key, cause, made.header)

    async def _expel(self, key: bytes, proof: Damaged, read: Header) -> None:
        """Drop an object on proof of damage (`_differs` has logged it), unless another is in its
        place by now."""
        self.counts.corrupt += 1
        if await is_still(self.tier, key, read):
            await self.delete([key])

    async def put(self, objects: Sequence[Object]) -> list[Lost | None]:
        lost: dict[int, Lost | None] = {}
        for i, obj in enumerate(objects):
            if not obj.sealed:
                continue
            key = obj.header.key
            cause = await self.ctx.pool(_difference, obj, 0, key, leases=(obj.lease,))
            if cause:
                self._differs("in", key, cause)
                lost[i] = Lost.CORRUPT
        right = [i for i in range(len(objects)) if i not in lost]
        with self._logged("put", len(right)) as said:
            kept = await self.tier.put([objects[i] for i in right])
            said += [f"{objects[i].header.key.hex()[:16]} {k.name}"
                     for i, k in zip(right, kept, strict=True) if k]  # fmt: skip
        lost |= zip(right, kept, strict=True)
        return [lost[i] for i in range(len(objects))]

    async def delete(self, keys: Sequence[bytes]) -> int:
        with self._logged("drop", len(keys)) as said:
            dropped = await self.tier.delete(keys)
            said.append(f"{dropped} were there")
        return dropped

    async def clear(self) -> int:
        with self._logged("clear") as said:
            cleared = await self.tier.clear()
            said.append(f"{cleared} were there")
        return cleared

    @contextmanager
    def _logged(self, call: str, count: int | None = None) -> Iterator[list[str]]:
        """One line for a call, also when it raises; what is put on the list ends it."""
        said: list[str] = []
        began = time.perf_counter()
        try:
            yield said
        except BaseException as error:
            said.append(f"raised {type(error).__name__}")
            raise
        finally:
            what = call if count is None else f"{call} of {count}"
            spent = 1e3 * (time.perf_counter() - began)
            log.info("%s: %s in %.3f ms: %s", self.use, what, spent, ", ".join(said) or "done")

    def _differs(self, way: str, key: bytes, cause: BadObject) -> None:
        self.counts.extra[f"differ_{way}"] += 1
        log.error("%s: object %s differs on its way %s: %s", self.use, key.hex()[:16], way, cause)


def _difference(obj: Object, begin: int, key: bytes) -> BadObject | None:
    """The first difference between an object and its checksums, from frame `begin` on, if any."""
    try:
        view = obj.lease.view
        if not begin:
            found, said = Header.unpack(view, key=key), obj.header
            # Where many namespaces are kept, an object goes by another name than its key.
            if found._replace(key=said.key, links=said.links) != said:
                return Damaged("its header differs")
        for i in range(begin, obj.loaded):
            frame = obj.header.frames[i]
            stored = view[frame.offset : frame.offset + frame.stored]
            if xxhash.xxh3_64_intdigest(stored) != frame.checksum:
                return Damaged(f"the checksum of frame {i} differs")
    except BadObject as error:
        return error
    return None
