"""What all pools have in common, over one that is a dictionary: no read leaves its lease."""

from __future__ import annotations

import ctypes

import pytest
from pooled_cases import manifest_of

from tierloom.stages.errors import Lost
from tierloom.stages.tiers.contract.tier import Read
from tierloom.stages.tiers.pools.manifest import Manifest
from tierloom.stages.tiers.pools.tier import Pooled
from tierloom.testing import ALL, SIZE, TierContract, key_of


class Shelf(Pooled):
    """A pool in this process."""

    def __init__(self, ctx) -> None:
        super().__init__(ctx, threads=2, piece=4096)
        self.kept: dict[str, bytes] = {}

    def _exists(self, names):
        return [name in self.kept for name in names]

    def _peek(self, names):
        return [self.kept.get(name) for name in names]

    def _fetch(self, pieces):
        found = []
        for piece in pieces:
            value = self.kept.get(piece.name)
            if value is not None and len(value) == piece.nbytes:
                ctypes.memmove(piece.address, value, piece.nbytes)
                found.append(None)
            else:
                found.append(Lost.ABSENT if value is None else Lost.CORRUPT)
        return found

    def _store(self, pieces):
        for piece in pieces:
            self.kept[piece.name] = ctypes.string_at(piece.address, piece.nbytes)
        return [None] * len(pieces)

    def _commit(self, manifests):
        self.kept |= manifests
        return [None] * len(manifests)

    def _remove(self, names):
        return [self.kept.pop(name, None) is not None for name in names]

    def _wipe(self):
        count = sum("/" not in name for name in self.kept)
        self.kept.clear()
        return count


class TestShelf(TierContract):
    ttl = bounded = False

    def make(self, ctx, folder, clock, **options):
        return Shelf(ctx)

    @pytest.mark.anyio
    @pytest.mark.parametrize("more", [1, 5])
    async def test_a_longer_record_in_the_place_of_the_one_at_hand(self, tier, arena, more):
        """The header is the same: of its frames the manifest says something else, and has them."""
        await self.put(tier, 1)
        read = Read(key_of(1), 1)
        await tier.read([read])
        held = read.object
        beside = arena.lease(4 * SIZE)
        beside.view[:] = b"\xa5" * beside.nbytes
        right = manifest_of(tier, key_of(1))
        longer = Manifest(right.writer, (*right.boundaries, right.boundaries[-1] + more * 4096))
        tier.kept[key_of(1).hex()] = longer.pack()
        for name, _, size in longer.names(key_of(1), tier.piece, 1, len(longer.boundaries)):
            tier.kept[name] = b"!" * size
        again = Read(key_of(1), ALL, held)
        await tier.read([again])
        assert again.lost in (Lost.ABSENT, Lost.CORRUPT)
        assert bytes(beside.view) == b"\xa5" * beside.nbytes
        arena.check()
        for lease in (held.lease, beside):
            lease.release()

    @pytest.mark.anyio
    async def test_no_address_lies_outside_of_its_lease(self, arena):
        lease = arena.lease(8192)
        assert lease.at(4096, 4096) == lease.address + 4096
        for begin, nbytes in ((0, 8193), (4096, 4097), (-1, 4), (8192, 1), (4, -1)):
            with pytest.raises(ValueError, match="outside of a lease of 8192"):
                lease.at(begin, nbytes)
        lease.release()
