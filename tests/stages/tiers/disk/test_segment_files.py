"""A disk tier has few files open, however many there are, also where no more may be opened."""

from __future__ import annotations

import os
import random
import resource
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.tiers.disk import segment_files
from tierloom.stages.tiers.disk.direct_io import SYSTEM
from tierloom.stages.tiers.disk.disk_segments import Segments
from tierloom.stages.tiers.disk.segment_files import SegmentFiles
from tierloom.stages.tiers.disk.tier import Disk, DiskOptions
from tierloom.testing import SIZE, TierBench


def open_in(folder: Path) -> int:
    """Descriptors of this process that are files of a folder."""
    fds = Path("/proc/self/fd")
    return sum(os.path.realpath(fds / name).startswith(f"{folder}/") for name in os.listdir(fds))


@contextmanager
def no_more_files():
    """This process may open none, but in the place of one that it closes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class TestManySegments(TierBench):
    segments = 200

    def make(self, ctx, folder, clock, **options):
        given = {"segment": 2 * PAGE, "keep_free": 0, "direct": False} | options
        capacity = self.segments * 2 * PAGE
        return Disk(DiskOptions(path=str(folder / "disk"), capacity=capacity, **given), ctx)

    @pytest.mark.anyio
    async def test_few_are_open(self, ctx, tmp_path, clock, arena):
        folder, seeds = tmp_path / "disk", range(self.segments * 2 * PAGE // SIZE)
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, *seeds)
            assert len(list(folder.glob("segment-*"))) > 150
            assert 0 < open_in(folder) <= 64
            for seed in seeds:
                assert await self.get(tier, seed) == self.bytes_of(arena, seed)
            assert open_in(folder) <= 64
        assert open_in(folder) == 0
        async with self.opened(ctx, tmp_path, clock) as tier:
            assert open_in(folder) <= 2, "the lock and the log"
            for seed in seeds:
                assert await self.get(tier, seed) == self.bytes_of(arena, seed)

    @pytest.mark.anyio
    async def test_where_the_process_may_open_no_more(self, ctx, tmp_path, clock, arena):
        seeds = range(self.segments * 2 * PAGE // SIZE)
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, 0)
            with no_more_files():
                with pytest.raises(OSError, match="Too many open files"):
                    os.dup(0)
                for seed in seeds:
                    assert await self.put(tier, seed) == [None]
                for seed in seeds:
                    assert await self.get(tier, seed) == self.bytes_of(arena, seed)
                await tier.clear()

    @pytest.mark.anyio
    async def test_a_snapshot_syncs_what_was_written_and_closed(
        self, ctx, tmp_path, clock, monkeypatch
    ):
        synced = set()
        fdatasync = os.fdatasync

        def noted(fd):
            synced.add(os.fstat(fd).st_ino)
            fdatasync(fd)

        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, *range(30))
            monkeypatch.setattr(os, "fdatasync", noted)
            tier._store._snapshot()
            files = {path.stat().st_ino for path in (tmp_path / "disk").glob("segment-*")}
            assert len(files) > segment_files.OPEN
            assert files <= synced
            synced.clear()
            tier._store._snapshot()
            assert not files & synced, "nothing was written since"


def test_threads_share_few_files(tmp_path, monkeypatch):
    """Each byte comes back from where it was written, while files are closed under all of them."""
    monkeypatch.setattr(segment_files, "OPEN", 2)
    segments = Segments(tmp_path, 2 * PAGE, 64 * PAGE, direct=False)
    while segments.grow(PAGE, 0):
        pass
    wrong: list[int] = []

    def work(first: int) -> None:
        rng = random.Random(first)
        mine = range(first, 64, 8)  # pages
        for turn in range(150):
            page = rng.choice(mine)
            raw, back = bytes([turn % 251]) * PAGE, bytearray(PAGE)
            segments.write([(page * PAGE, PAGE)], memoryview(raw))
            segments.read([(page * PAGE, PAGE)], memoryview(back), 0, PAGE)
            if back != raw:
                wrong.append(page)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    with segments.files.opened(0), segments.files.opened(1), segments.files.opened(2):
        assert len(segments.files) == 3  # those in use
    with segments.files.opened(3):
        assert len(segments.files) <= 2
    segments.close()
    assert open_in(tmp_path) == 0


def test_a_file_in_use_stays_open_when_another_takes_its_name(tmp_path):
    files = SegmentFiles(tmp_path, direct=False, file_io=SYSTEM)
    with files.opened(0, write=True) as fd:
        os.pwrite(fd, b"old", 0)
    with files.opened(0) as fd:
        files.path(0).unlink()
        with files.opened(0, write=True) as other:
            os.pwrite(other, b"new", 0)
            assert (os.pread(fd, 3, 0), os.pread(other, 3, 0)) == (b"old", b"new")
        assert os.pread(fd, 3, 0) == b"old"
    with files.opened(0) as fd:
        assert os.pread(fd, 3, 0) == b"new"
    assert len(files) == open_in(tmp_path) == 1
    files.close()


def test_who_needs_a_file_waits_for_one_that_is_in_use(tmp_path):
    files = SegmentFiles(tmp_path, direct=False, file_io=SYSTEM)
    with files.opened(0, write=True), files.opened(1, write=True):
        pass
    taken, go = threading.Event(), threading.Event()

    def hold() -> None:
        with files.opened(0), files.opened(1):
            taken.set()
            go.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(30)
    with no_more_files():
        threading.Timer(0.05, go.set).start()
        with files.opened(2, write=True) as fd:
            assert os.fstat(fd).st_size == 0
    thread.join()
    files.close()
    with no_more_files(), pytest.raises(OSError, match="Too many"), files.opened(0):
        pass
