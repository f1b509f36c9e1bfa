"""disk: the contract with and without O_DIRECT, restarts, the folder, and what fills it."""

from __future__ import annotations

import errno
import os
import random

import pytest

from tierloom.stages.errors import ConfigError, Lost
from tierloom.stages.memory.allocator import PAGE, Space
from tierloom.stages.tiers.contract.tier import Read
from tierloom.stages.tiers.disk import direct_io as disk_io, disk_segments
from tierloom.stages.tiers.disk.tier import Disk, DiskOptions
from tierloom.testing import ALL, SIZE, TierContract, encrypted_anew, key_of, links_of

SEGMENT = 5 * PAGE  # shorter than an object: each lies in several files


class DiskContract(TierContract):
    local = True
    direct = False

    def make(self, ctx, folder, clock, *, capacity=32 * SIZE, **options):
        if self.direct and not disk_io.can_direct(folder):
            pytest.skip("the file system refuses O_DIRECT")
        given = {"segment": SEGMENT, "keep_free": 0, "direct": self.direct} | options
        path = str(folder / "disk")
        return Disk(DiskOptions(path=path, capacity=capacity, **given), ctx, clock=clock)

    def damage(self, tier, key, change):
        store = tier._store
        parts = []  # (file, place in it, bytes)
        for offset, nbytes in tier._index.get(key).place.pieces:
            while nbytes:
                number, at = divmod(offset, SEGMENT)
                step = min(nbytes, SEGMENT - at)
                parts.append((store._folder / f"segment-{number:05}.slab", at, step))
                offset, nbytes = offset + step, nbytes - step
        raw = bytearray(b"".join(path.read_bytes()[at : at + n] for path, at, n in parts))
        change(raw)
        for path, at, nbytes in parts:
            with path.open("r+b") as file:
                file.seek(at)
                file.write(raw[:nbytes])
                if len(raw) < nbytes:
                    file.truncate()
            del raw[:nbytes]


class TestDirect(DiskContract):
    direct = True


class TestBuffered(DiskContract):
    @pytest.mark.anyio
    async def test_restart(self, ctx, tmp_path, clock, arena):
        right = {seed: self.bytes_of(arena, seed) for seed in range(6)}
        async with self.opened(ctx, tmp_path, clock, capacity=6 * SIZE) as tier:
            await self.put(tier, *right)
            tier.pin([key_of(2)])
            await tier.delete([key_of(3)])
        async with self.opened(ctx, tmp_path, clock, capacity=6 * SIZE) as tier:
            assert tier.stat() == (5, 5 * SIZE, 6 * SIZE)
            other = links_of(1)[:96] + links_of(9)[96:]
            assert tier.find(other) == (key_of(1), 3, SIZE)
            for seed, raw in right.items():
                assert await self.get(tier, seed) == (Lost.ABSENT if seed == 3 else raw)
            await self.put(tier, *range(20, 30))
            assert await tier.exists([key_of(2), key_of(1)]) == [True, False]

    @pytest.mark.anyio
    async def test_restart_with_less_room(self, ctx, tmp_path, clock, arena):
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, *range(10))
        async with self.opened(ctx, tmp_path, clock, capacity=4 * SIZE) as tier:
            files = (tmp_path / "disk").glob("segment-*")
            assert sum(path.stat().st_size for path in files) <= 4 * SIZE
            assert 0 < tier.stat().nbytes <= 4 * SIZE
            for seed in range(10):
                assert await self.get(tier, seed) in (Lost.ABSENT, self.bytes_of(arena, seed))
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, *range(30))
            assert tier.stat().objects == 30

    @pytest.mark.anyio
    async def test_time_goes_on_while_closed(self, ctx, tmp_path, clock):
        async with self.opened(ctx, tmp_path, clock, ttl=60.0) as tier:
            await self.put(tier, 1)
        clock.now += 30
        async with self.opened(ctx, tmp_path, clock, ttl=60.0) as tier:
            await self.put(tier, 2)
            clock.now += 31
            assert await tier.exists([key_of(1), key_of(2)]) == [False, True]

    @pytest.mark.anyio
    async def test_a_shorter_ttl_rules(self, ctx, tmp_path, clock):
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, 1)
        async with self.opened(ctx, tmp_path, clock, ttl=60.0) as tier:
            clock.now += 61
            assert await self.get(tier, 1) is Lost.ABSENT

    @pytest.mark.anyio
    async def test_one_process_per_folder(self, ctx, tmp_path, clock, tier):
        other = self.make(ctx, tmp_path, clock)
        with pytest.raises(ConfigError, match="in use by another"):
            await other.open()
        await other.close()
        await self.put(tier, 1)

    @pytest.mark.anyio
    async def test_a_folder_we_may_not_write(self, ctx, tmp_path, clock):
        (tmp_path / "disk").write_text("a file")
        with pytest.raises(ConfigError, match="write permission"):
            await self.make(ctx, tmp_path, clock).open()

    @pytest.mark.anyio
    async def test_direct_refused(self, ctx, tmp_path, clock, monkeypatch):
        monkeypatch.setattr(disk_io, "can_direct", lambda folder: False)
        tier = self.make(ctx, tmp_path, clock, direct=True)
        with pytest.raises(ConfigError, match="set direct: auto"):
            await tier.open()
        await tier.close()
        async with self.opened(ctx, tmp_path, clock, direct="auto") as tier:
            await self.put(tier, 1)
            assert isinstance(await self.get(tier, 1), bytes)

    @pytest.mark.anyio
    async def test_a_full_file_system_is_the_capacity(self, ctx, tmp_path, clock, monkeypatch):
        left = [4 * SEGMENT]

        def fallocate(fd, at, nbytes):
            if nbytes > left[0]:
                raise OSError(errno.ENOSPC, "no space left")
            left[0] -= nbytes
            os.ftruncate(fd, at + nbytes)

        monkeypatch.setattr(disk_segments, "reserve", fallocate)
        async with self.opened(ctx, tmp_path, clock) as tier:
            for seed in range(10):
                assert await self.put(tier, seed) == [None]
            assert 0 < tier.stat().nbytes <= 4 * SEGMENT
            assert tier.counts.evicted >= 5

    @pytest.mark.anyio
    async def test_space_is_left_to_others_and_said_once(self, ctx, tmp_path, clock, caplog):
        async with self.opened(ctx, tmp_path, clock, keep_free=1 << 60) as tier:
            assert await self.put(tier, 1) == [Lost.NO_ROOM]
            assert await self.put(tier, 2) == [Lost.NO_ROOM]
            assert [r.getMessage().count("stops growing") for r in caplog.records] == [1]
            assert not list((tmp_path / "disk").glob("segment-*"))

    @pytest.mark.anyio
    async def test_short_reads_and_writes(self, tier, arena, monkeypatch):
        preadv, pwritev = os.preadv, os.pwritev
        monkeypatch.setattr(os, "preadv", lambda fd, v, at: preadv(fd, [v[0][:8192]], at))
        monkeypatch.setattr(os, "pwritev", lambda fd, v, at: pwritev(fd, [v[0][:8192]], at))
        await self.put(tier, 1)
        assert await self.get(tier, 1) == self.bytes_of(arena, 1)

    @pytest.mark.anyio
    async def test_a_broken_disk_raises_and_gives_all_back(self, tier, monkeypatch):
        await self.put(tier, 1)

        def broken(*_):
            raise OSError(errno.EIO, "input/output error")

        monkeypatch.setattr(os, "preadv", broken)
        reads = [Read(key_of(1), ALL)]
        with pytest.raises(OSError, match="input/output"):
            await tier.read(reads)
        assert reads[0].object is None
        monkeypatch.setattr(os, "pwritev", broken)
        free = tier._store._space.free_bytes
        with pytest.raises(OSError, match="input/output"):
            await self.put(tier, 2, 3)
        monkeypatch.undo()
        assert tier._store._space.free_bytes >= free
        assert await tier.exists([key_of(2)]) == [False]

    @pytest.mark.anyio
    async def test_dropped_while_read(self, ctx, tmp_path, clock, pool, arena):
        """The extent of an object that is being read is not used again before the read ends."""
        async with self.opened(ctx, tmp_path, clock, capacity=2 * SIZE) as tier:
            await self.put(tier, 1, 2)
            entry = tier._index.get(key_of(1))
            with tier._store._reading(entry) as there:
                assert there
                await tier.delete([key_of(1)])
                assert tier._store._space.free_bytes == 0
                assert await self.put(tier, 3) == [None]  # takes the place of 2
                with tier._store._reading(entry) as again:
                    assert not again
            assert tier._store._space.free_bytes == SIZE
            assert await self.get(tier, 3) == self.bytes_of(arena, 3)

    @pytest.mark.anyio
    @pytest.mark.parametrize("cut", ["as before", "otherwise"])
    async def test_put_again_between_two_layers(self, tier, arena, cut):
        """Another object under the same key is not mixed with the first, and is not to blame."""
        await self.put(tier, 1)
        read = Read(key_of(1), 1)
        await tier.read([read])
        await tier.delete([key_of(1)])
        other = encrypted_anew(arena, 1)
        assert await tier.put([other]) == [None]
        if cut == "otherwise":
            entry = tier._index.get(key_of(1))
            *first, last, _ = entry.place.boundaries
            entry.place.boundaries = (*first, last - PAGE, SIZE)
        again = Read(key_of(1), ALL, read.object)
        await tier.read([again])
        assert again.lost is Lost.ABSENT
        assert await tier.exists([key_of(1)]) == [True]
        for obj in (read.object, other):
            obj.lease.release()

    @pytest.mark.anyio
    async def test_a_snapshot_replaces_the_log(self, ctx, tmp_path, clock, monkeypatch):
        from tierloom.stages.tiers.disk import index_log as disk_log

        monkeypatch.setattr(disk_log, "_SMALL_LOG", 2000)
        async with self.opened(ctx, tmp_path, clock, capacity=4 * SIZE) as tier:
            for seed in range(40):
                await self.put(tier, seed)
            logs = list((tmp_path / "disk").glob("index-*"))
            assert sum(path.stat().st_size for path in logs) < 8000
            kept = await tier.exists([key_of(s) for s in range(40)])
        async with self.opened(ctx, tmp_path, clock, capacity=4 * SIZE) as tier:
            assert await tier.exists([key_of(s) for s in range(40)]) == kept
            assert sum(kept) == 4

    @pytest.mark.anyio
    async def test_closed_is_down(self, ctx, tmp_path, clock):
        from tierloom.stages.errors import TierDown

        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, 1)
        with pytest.raises(TierDown):
            await tier.read([Read(key_of(1), ALL)])
        with pytest.raises(TierDown):
            await tier.clear()


@pytest.mark.parametrize(
    "options",
    [
        {"path": ""}, {"capacity": 10}, {"evict": "best"}, {"direct": "maybe"}, {"depth": 0},
        {"ttl": -1.0}, {"keep_free": -1}, {"segment": 1},
    ],
)  # fmt: skip
def test_bad_options(options):
    with pytest.raises(ValueError):
        DiskOptions(**({"path": "/x", "capacity": 1 << 20} | options))


@pytest.mark.parametrize("kind", ["equal", "tails", "compressed"])
def test_the_capacity_is_used(kind):
    """The placement of the disk tier, evicting in order: 97 % of the capacity hold objects."""
    pages, chunks = 257, 256
    space, rng = Space(chunks * pages * PAGE), random.Random(1)
    kept: list[list[tuple[int, int]]] = []
    shares, pieces = [], 0
    for turn in range(6 * chunks):
        size = pages
        if kind == "tails" and rng.random() < 0.25:
            size = rng.randrange(1, pages)
        elif kind == "compressed":
            size = rng.randrange(pages * 6 // 10, pages)
        while (taken := space.take_split(size * PAGE, 4)) is None:
            for piece in kept.pop(rng.randrange(min(20, len(kept)))):
                space.give(*piece)
        kept.append(taken)
        pieces += len(taken)
        if turn > 3 * chunks:
            shares.append(space.used / space.total)
    assert sum(shares) / len(shares) >= 0.97
    print(f"{kind}: {sum(shares) / len(shares):.4f} of the capacity, {pieces / turn:.2f} pieces")
