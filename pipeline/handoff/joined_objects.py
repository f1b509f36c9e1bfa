"""Joining: chunks whose KV comes from several workers, or from one that has more than is wanted.

Objects come by `Arrival`, whole and checked, under the namespaces of those who sent them. Of each
chunk one object is made of all, with checksums of its own, before anything shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from tierloom.pipeline.handoff.shares import Bounds, OwnShare, ShareHolder, shared_bounds
from tierloom.pipeline.run.threads import Pool
from tierloom.stages.errors import ArenaFull, Damaged, Lost
from tierloom.stages.kv.object import Header, Object
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker

_SAME = ("key", "parent", "token_digest", "tokens", "grain", "links")
"""What the shares of one chunk have in common."""


class Joining:
    """The chunks of one hand-off. On the loop; objects are joined in a thread. Owns the leases of
    those until `close`."""

    def __init__(
        self, own: OwnShare, group: int, sources: Sequence[ShareHolder], memory: CircuitBreaker,
        arena: Arena, pool: Pool, *, refuse: Callable[[str], None],
    ) -> None:  # fmt: skip
        """`group`: layers of a frame. `memory`: the tier that keeps what was joined. `refuse` is
        told why none can be."""
        self._own, self._group, self._sources = own, group, sources
        self._memory, self._arena, self._pool, self._refuse = memory, arena, pool, refuse
        self._parts: dict[int, dict[int, Object]] = {}
        self._leases = ExitStack()
        self._kept: list[bytes] = []

    @property
    def came(self) -> int:
        """Objects that were joined, and are kept."""
        return len(self._kept)

    def close(self) -> None:
        self._memory.order_for_eviction(self._kept)
        self._leases.close()

    async def add(self, source: int, chunk: int, obj: Object) -> Lost | None:
        """What source number `source` has of a chunk; with the last one it is joined and shown.
        Whoever calls holds the leases of all until the hand-off is over. Raises Damaged."""
        parts = self._parts.setdefault(chunk, {})
        parts[source] = obj
        if len(parts) < len(self._sources):
            return None
        objects = [parts[i] for i in range(len(self._sources))]
        headers = [obj.header for obj in objects]
        if any(f.codecs for header in headers for f in header.frames):
            self._refuse("engines that divide the model otherwise must store it without a codec")
            return Lost.FOREIGN
        header = self._header(headers)
        try:
            lease = self._arena.lease(header.nbytes)
        except ArenaFull:
            return Lost.NO_ROOM
        self._leases.callback(lease.release)
        leases = [lease, *(obj.lease for obj in objects)]
        whole = Object(header, lease)
        await self._pool(self._fill, whole, objects, leases=leases)
        lost = (await self._memory.put([whole]))[0]
        if lost is None:
            self._kept.append(header.key)
        return lost

    def _header(self, headers: Sequence[Header]) -> Header:
        """Of the object that these make. Raises Damaged unless they are of one chunk."""
        first, g = headers[0], self._own.geometry
        for header, source in zip(headers, self._sources, strict=True):
            if header.geometry != source.geometry:
                raise Damaged(f"a share of {header.geometry}, not of {source.geometry}")
            if any(getattr(header, name) != getattr(first, name) for name in _SAME):
                raise Damaged("the shares of a chunk are of different text")
        raw = [
            g.frame_bytes(min(self._group, g.layers - at), first.tokens)
            for at in range(0, g.layers, self._group)
        ]
        made = first._replace(namespace=self._own.space, geometry=g, group=self._group)
        return made.with_frames(raw, raw)

    def _fill(self, whole: Object, objects: Sequence[Object]) -> None:
        """Copy what is wanted of each, and write checksums and header. Blocks."""
        from tierloom.triton_kernels.checksum.xxh3_cpu import xxh3_64

        own = self._own
        for obj, source in zip(objects, self._sources, strict=True):
            heads = shared_bounds(source.rank.heads, own.heads)
            for layers, rows in _frames(obj, source.rank.layers[0]):
                for wanted, place in _frames(whole, own.layers[0]):
                    both = shared_bounds(layers, wanted)
                    if both[0] < both[1]:
                        there = _cut(rows, both, layers[0], heads, source.rank.heads[0])
                        _cut(place, both, wanted[0], heads, own.heads[0])[...] = there
        at = whole.lease.at(0, whole.header.nbytes)
        whole.seal([xxh3_64(at + f.offset, f.stored) for f in whole.header.frames])


def _frames(obj: Object, first: int) -> list[tuple[Bounds, npt.NDArray[np.uint8]]]:
    """Of each frame its layers, as the whole model counts them from `first` on, and its rows:
    uint8 [kv, layers, tokens, heads, bytes of a head] in the object's memory."""
    header, g = obj.header, obj.header.geometry
    found = []
    for i, f in enumerate(header.frames):
        at = i * header.group
        count = min(header.group, g.layers - at)
        shape = (g.kv, count, header.tokens, g.heads, g.dim * g.itemsize)
        rows = np.frombuffer(obj.lease.view, np.uint8, f.stored, f.offset).reshape(shape)
        found.append(((first + at, first + at + count), rows))
    return found


def _cut(
    rows: npt.NDArray[np.uint8], layers: Bounds, first: int, heads: Bounds, head: int
) -> npt.NDArray[np.uint8]:
    """Layers and heads of rows that begin at layer `first` and head `head`."""
    return rows[:, layers[0] - first : layers[1] - first, :, heads[0] - head : heads[1] - head]
