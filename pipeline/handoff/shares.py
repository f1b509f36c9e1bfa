"""Which workers of another engine have what this one keeps: its own share of the model's KV, or
shares of other bounds, which are cut and joined.

Chunks have the same names in all workers, whatever layers and KV heads each holds; only namespaces
differ. So a share is asked for by the namespace that it must have, and by no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from tierloom.stages.kv.geometry import Geometry
from tierloom.stages.kv.namespace import Namespace
from tierloom.stages.tiers.server.ranks import RankShare

Bounds = tuple[int, int]
"""The first and one past the last."""


class ShareHolder(NamedTuple):
    """A worker that has some of what is wanted."""

    rank: RankShare
    geometry: Geometry
    askers: int
    """Workers that ask it for the same ticket, if all engines' shares are of one size."""


class OwnShare:
    """What one pipeline keeps."""

    def __init__(self, names: Namespace, geometry: Geometry) -> None:
        """`names`: whose digest its objects carry; `geometry`: of its objects."""
        self._names, self.geometry = names, geometry
        self.space = names.digest
        self.layers, self.heads = names.layers, names.heads
        self._divides = not geometry.native and (geometry.layers, geometry.heads) == (
            _size(self.layers), _size(self.heads),
        )  # fmt: skip

    def at(self, address: str) -> RankShare:
        """As it is told to others."""
        return RankShare(self.space, self.layers, self.heads, address)

    def sources(self, ranks: Sequence[RankShare]) -> list[ShareHolder]:
        """Workers whose shares make up this one, each of its layers and heads once; empty: there
        are none."""
        same = [rank for rank in ranks if rank.space == self.space]
        if same:
            return [ShareHolder(same[0], self.geometry, 1)]
        if not self._divides:
            return []
        free = np.ones((_size(self.layers), _size(self.heads)), bool)
        found: list[ShareHolder] = []
        for rank in ranks:
            cells = free[_within(rank.layers, self.layers), _within(rank.heads, self.heads)]
            geometry = replace(self.geometry, layers=_size(rank.layers), heads=_size(rank.heads))
            if cells.size and cells.all() and rank.space == self._space_of(rank, geometry):
                cells[:] = False
                found.append(ShareHolder(rank, geometry, self._askers(rank)))
        return [] if free.any() else found

    def _space_of(self, rank: RankShare, geometry: Geometry) -> bytes:
        """The namespace of such a share of this very model."""
        return replace(
            self._names, layers=rank.layers, heads=rank.heads, geometry=str(geometry)
        ).digest

    def _askers(self, rank: RankShare) -> int:
        each = ((rank.layers, self.layers), (rank.heads, self.heads))
        layers, heads = (max(1, _size(theirs) // _size(mine)) for theirs, mine in each)
        return layers * heads


def shared_bounds(one: Bounds, other: Bounds) -> Bounds:
    """What two have in common; the first is past the last where that is nothing."""
    return max(one[0], other[0]), min(one[1], other[1])


def _size(bounds: Bounds) -> int:
    return bounds[1] - bounds[0]


def _within(bounds: Bounds, whole: Bounds) -> slice:
    first, last = shared_bounds(bounds, whole)
    return slice(first - whole[0], max(first, last) - whole[0])
