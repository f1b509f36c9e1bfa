"""disk and files where nothing more can be written: what is kept is served, and nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from tierloom.stages.errors import Lost
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.disk.index_log import IndexLog
from tierloom.stages.tiers.disk.tier import Disk, DiskOptions
from tierloom.stages.tiers.files.space import FilesOptions
from tierloom.stages.tiers.files.tier import Files
from tierloom.testing import SIZE, TierBench, key_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FULL = OSError(errno.ENOSPC, "No space left on device")


def full(*_: object) -> None:
    raise FULL


def space_of(tier: CircuitBreaker) -> int:
    """Bytes that are neither an object's nor free nor yet to be added."""
    store = tier.tier._store
    missing = sum(n for _, n in store._segments.missing())
    return store.capacity - store._space.free_bytes - store.index.nbytes - missing


class TestFullDisk(TierBench):
    def make(self, ctx, folder, clock, *, capacity=8 * SIZE, **options):
        given = {"segment": 64 * PAGE, "keep_free": 0, "direct": False} | options
        tier = Disk(DiskOptions(path=str(folder / "disk"), capacity=capacity, **given), ctx)
        limits = SimpleNamespace(timeout=30.0, fails=3, probe=1.0)
        return CircuitBreaker(tier, "warm", limits, clock=clock)

    async def all_there(self, tier, arena, *seeds):
        for seed in seeds:
            assert await self.get(tier, seed) == self.bytes_of(arena, seed)

    @pytest.mark.anyio
    async def test_a_log_that_takes_nothing(self, ctx, tmp_path, clock, arena, monkeypatch):
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, *range(8))
            with monkeypatch.context() as patch:
                patch.setattr(IndexLog, "_write", full)
                for seed in range(20, 30):
                    assert await self.put(tier, seed) == [Lost.NO_ROOM]
                    clock.now += 61
                assert space_of(tier) == 0
                assert tier.tier.counts.evicted == 0
                await self.all_there(tier, arena, *range(8))
                assert tier.available
                # a deletion counts at once, and is written before its space is another object's
                assert await tier.delete([key_of(3)]) == 0
                assert await self.get(tier, 3) is Lost.ABSENT
            clock.now += 61
            assert await self.put(tier, 40) == [None]
            assert space_of(tier) == 0
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.all_there(tier, arena, 0, 1, 2, 4, 5, 6, 7, 40)
            assert await self.get(tier, 3) is Lost.ABSENT
            assert space_of(tier) == 0

    @pytest.mark.anyio
    async def test_nothing_is_evicted_for_a_put_that_is_refused(
        self, ctx, tmp_path, clock, arena, monkeypatch
    ):
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, *range(8))
            monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=0, f_frsize=4096))
            assert await self.put(tier, 20, 21) == [Lost.NO_ROOM] * 2
            assert tier.tier.counts.evicted == 0
            await self.all_there(tier, arena, *range(8))
            monkeypatch.undo()
            clock.now += 61
            assert await self.put(tier, 20) == [None]
            assert tier.tier.counts.evicted == 1

    @pytest.mark.anyio
    async def test_a_restart_on_a_full_disk(self, ctx, tmp_path, clock, arena, monkeypatch):
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, *range(6))
        begin = IndexLog._begin
        monkeypatch.setattr(IndexLog, "_begin", full)
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.all_there(tier, arena, *range(6))
            assert await self.put(tier, 20) == [Lost.NO_ROOM]
            await self.all_there(tier, arena, *range(6))
            monkeypatch.setattr(IndexLog, "_begin", begin)
            clock.now += 61
            assert await self.put(tier, 21) == [None]
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.all_there(tier, arena, *range(6), 21)

    @pytest.mark.anyio
    async def test_a_snapshot_that_fails_leaves_nothing(self, ctx, tmp_path, clock, monkeypatch):
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, *range(4))
            before = len(os.listdir("/proc/self/fd"))
            monkeypatch.setattr(os, "fdatasync", full)
            tier.tier._store._snapshot()
            assert not list((tmp_path / "disk").glob("*.tmp"))
            assert len(os.listdir("/proc/self/fd")) == before
            monkeypatch.undo()
        async with self.opened(ctx, tmp_path, clock) as tier:
            assert tier.stat().objects == 4

    @pytest.mark.anyio
    async def test_what_fails_to_open_can_be_opened_later(self, ctx, tmp_path, clock, monkeypatch):
        """The folder is not taken by the one that failed."""
        tier = self.make(ctx, tmp_path, clock)
        with monkeypatch.context() as patch:
            patch.setattr(IndexLog, "load", full)
            await tier.open()
            assert not tier.available
        clock.now += 2
        assert await self.put(tier, 1) == [None]
        await tier.close()


@contextmanager
def small_file_system(at: Path) -> Iterator[Path]:
    """A mount of its own; skips where we may not mount."""
    at.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(at)], check=False)
    if made.returncode:
        pytest.skip("no right to mount")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def remount(at: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(at)], check=True)


@pytest.mark.skipif(not shutil.which("mount"), reason="no mount")
@pytest.mark.parametrize("kind", ["disk", "files"])
class TestReadOnly(TierBench):
    kind = "disk"

    def make(self, ctx, folder, clock, **_):
        path = str(folder / self.kind)
        if self.kind == "disk":
            tier = Disk(DiskOptions(path=path, capacity=4 << 20, keep_free=0), ctx)
        else:
            tier = Files(FilesOptions(path=path), ctx, clock=clock)
        return CircuitBreaker(tier, "warm", SimpleNamespace(timeout=30.0, fails=3, probe=1.0))

    @pytest.mark.anyio
    async def test_what_is_kept_is_served(self, ctx, tmp_path, clock, arena, kind, caplog):
        self.kind = kind
        with small_file_system(tmp_path / "mount") as folder:
            async with self.opened(ctx, folder, clock) as tier:
                await self.put(tier, *range(6))
                if kind == "files":  # a disk tier holds files open, and they forbid it
                    remount(folder, "ro")
                    for seed in range(6):
                        assert await self.get(tier, seed) == self.bytes_of(arena, seed)
                    assert await self.put(tier, 9) == [Lost.REFUSED]
            remount(folder, "ro")
            caplog.clear()
            async with self.opened(ctx, folder, clock) as tier:
                for seed in range(6):
                    assert await self.get(tier, seed) == self.bytes_of(arena, seed)
                for seed in range(10, 14):
                    assert await self.put(tier, seed) == [Lost.REFUSED]
                assert tier.available
            (said,) = [r.getMessage() for r in caplog.records]
            assert "takes nothing, and serves what it has" in said
            assert "Read-only file system" in said
            remount(folder, "rw")
            async with self.opened(ctx, folder, clock) as tier:
                assert await self.put(tier, 9) == [None]
                for seed in (*range(6), 9):
                    assert await self.get(tier, seed) == self.bytes_of(arena, seed)
