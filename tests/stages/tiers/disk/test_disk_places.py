"""disk on file systems that refuse something, and in folders that somebody else was in."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tierloom.stages.errors import Lost, TierDown
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.disk import direct_io
from tierloom.stages.tiers.disk.direct_io import FileIO
from tierloom.stages.tiers.disk.folder_lock import FolderLock
from tierloom.stages.tiers.disk.tier import Disk, DiskOptions
from tierloom.stages.tiers.files.space import FilesOptions
from tierloom.stages.tiers.files.tier import Files
from tierloom.testing import SIZE, TierBench

NUMBERS = {"x86_64": 285, "aarch64": 47}
"""Of the system call fallocate."""

REFUSED = """
import ctypes, struct, sys
import anyio
from pathlib import Path
from tierloom import testing
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.tier import TierContext
from tierloom.stages.tiers.disk.direct_io import can_direct
from tierloom.stages.tiers.disk.tier import Disk, DiskOptions

libc = ctypes.CDLL(None, use_errno=True)
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, int(sys.argv[2])), (6, 0, 0, 0x5005F), (6, 0, 0, 0x7FFF0000)]
raw = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(raw)))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program, 0, 0) == 0  # fallocate: Operation not supported

async def main():
    arena = Arena(64 * testing.SIZE, huge_pages=False)
    ctx = TierContext(arena, testing.NAMESPACE, testing.Pool())
    bench = testing.TierBench()
    for direct in ("auto", False):
        path = f"{sys.argv[1]}/{direct}"
        options = DiskOptions(path=path, capacity=8 * testing.SIZE, keep_free=0, direct=direct)
        for seeds in (range(4), range(2, 6)):
            tier = Disk(options, ctx)
            await tier.open()
            for seed in seeds:
                assert await bench.put(tier, seed) == [None]
                assert await bench.get(tier, seed) == bench.bytes_of(arena, seed)
            assert tier.stat().objects == seeds[-1] + 1
            await tier.close()
    print("direct" if can_direct(Path(sys.argv[1])) else "buffered")

anyio.run(main)
"""


@pytest.mark.skipif(platform.machine() not in NUMBERS, reason="number of fallocate not known")
def test_a_file_system_that_reserves_nothing(tmp_path):
    """NFS before 4.2, FUSE: as `fallocate` answers there, for a process of its own."""
    number = str(NUMBERS[platform.machine()])
    command = [sys.executable, "-P", "-c", REFUSED, str(tmp_path), number]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout in ("direct\n", "buffered\n")


class LateFileIO(FileIO):
    """O_DIRECT is taken when a file is opened, and refused when bytes are to be moved."""

    def __init__(self, at: str) -> None:
        self.at, self.on = at, False

    def open(self, path, flags, mode=0o666):
        if self.on and self.at == "open" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return super().open(path, flags, mode)

    def _refuse(self, fd, at):
        if self.on and self.at == at and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")

    def read(self, fd, view, at):
        self._refuse(fd, "read")
        super().read(fd, view, at)

    def write(self, fd, view, at):
        self._refuse(fd, "write")
        super().write(fd, view, at)


def files_of(folder):
    return {path.name: path for path in folder.iterdir() if path.is_file()}


class TestPlaces(TierBench):
    file_io = direct_io.SYSTEM

    def make(self, ctx, folder, clock, **options):
        given = {"segment": 2 * SIZE, "keep_free": 0, "direct": False} | options
        path = str(folder / "disk")
        options = DiskOptions(path=path, capacity=8 * SIZE, **given)
        return Disk(options, ctx, clock=clock, file_io=self.file_io)

    async def goes_on(self, ctx, tmp_path, clock, tier, *seeds):
        """What is put now is there, also after a restart."""
        assert await self.put(tier, *seeds) == [None] * len(seeds)
        arena = ctx.arena
        for seed in seeds:
            assert await self.get(tier, seed) == self.bytes_of(arena, seed)
        await tier.close()
        async with self.opened(ctx, tmp_path, clock) as again:
            for seed in seeds:
                assert await self.get(again, seed) == self.bytes_of(arena, seed)

    @pytest.mark.anyio
    @pytest.mark.parametrize("at", ["open", "read", "write"])
    async def test_o_direct_that_is_refused_late(self, ctx, tmp_path, clock, arena, caplog, at):
        if not direct_io.can_direct(tmp_path):
            pytest.skip("the file system refuses O_DIRECT")
        self.file_io = LateFileIO(at)
        tier = self.make(ctx, tmp_path, clock, direct="auto")
        await tier.open()
        assert await self.put(tier, 1) == [None]
        self.file_io.on = True
        assert await self.get(tier, 1) == self.bytes_of(arena, 1)
        assert await self.put(tier, 2, 3, 4) == [None] * 3
        assert await self.get(tier, 1) == self.bytes_of(arena, 1)
        said = [r.getMessage() for r in caplog.records]
        assert [text for text in said if "refuses O_DIRECT" in text] == said
        assert len(said) == (at != "open")
        await self.goes_on(ctx, tmp_path, clock, tier, 3, 5)

    @pytest.mark.anyio
    @pytest.mark.parametrize("kind", ["disk", "files"])
    async def test_a_path_that_is_not_utf8(self, ctx, tmp_path, clock, arena, kind, caplog):
        path = os.fsdecode(os.fsencode(tmp_path) + b"/kv-\xff\xfe")
        limits = SimpleNamespace(timeout=30.0, fails=1, probe=1.0)

        def make():
            if kind == "files":
                return Files(FilesOptions(path=path), ctx)
            return Disk(DiskOptions(path=path, capacity=8 * SIZE, keep_free=0), ctx)

        for _ in range(2):
            tier = CircuitBreaker(make(), "warm", limits)
            await tier.open()
            assert await self.put(tier, 1) == [None]
            assert await self.get(tier, 1) == self.bytes_of(arena, 1)
            await tier.close()
        tier.trip(OSError(f"{path}: gone"))
        (said,) = [r.getMessage() for r in caplog.records]
        assert said.encode("utf-8").count(b"/kv-\\udcff\\udcfe") == 2

    @pytest.mark.anyio
    @pytest.mark.parametrize("what", ["files", "folder", "lock"])
    async def test_a_folder_that_somebody_emptied(self, ctx, tmp_path, clock, what, caplog):
        folder = tmp_path / "disk"
        tier = self.make(ctx, tmp_path, clock)
        await tier.open()
        await self.put(tier, *range(4))
        if what == "folder":
            shutil.rmtree(folder)
        else:
            for name, path in files_of(folder).items():
                if what == "files" or name == "lock":
                    path.unlink()
        await self.goes_on(ctx, tmp_path, clock, tier, *range(10, 14))
        assert [r.getMessage() for r in caplog.records] == [
            f"disk tier at {folder}: somebody emptied it; it begins anew"
        ]
        async with self.opened(ctx, tmp_path, clock) as tier:
            assert tier.stat().objects == (8 if what == "lock" else 4)

    @pytest.mark.anyio
    async def test_who_only_reads_finds_out_too(self, ctx, tmp_path, clock):
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, *range(4))
            shutil.rmtree(tmp_path / "disk")
            tier._store._segments.files.close()  # as when others were used since
            assert await self.get(tier, 1) is Lost.ABSENT
            assert tier.stat().objects == 0, "nothing is planned from it any more"
            assert await self.put(tier, 1) == [None]

    @pytest.mark.anyio
    async def test_another_process_took_the_emptied_folder(self, ctx, tmp_path, clock, arena):
        folder = tmp_path / "disk"
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, 1)
            shutil.rmtree(folder)
            other = FolderLock(folder, segment=2 * SIZE)
            for _ in range(2):
                with pytest.raises(TierDown, match="in use by another"):
                    await self.put(tier, 2)
            assert await self.get(tier, 1) is Lost.ABSENT
            other.release()
            assert await self.put(tier, 2) == [None]
            assert await self.get(tier, 2) == self.bytes_of(arena, 2)

    @pytest.mark.anyio
    async def test_a_mount_that_is_gone_is_not_filled(self, ctx, tmp_path, clock, arena):
        folder = tmp_path / "disk"
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, 1)
            folder.rename(tmp_path / "elsewhere")
            folder.mkdir()
            tier._store._lock._device += 1
            with pytest.raises(TierDown, match="another file system is mounted there"):
                await self.put(tier, 2)
            assert not list(folder.iterdir())
            tier._store._lock._device -= 1
            folder.rmdir()
            (tmp_path / "elsewhere").rename(folder)
            assert await self.get(tier, 1) == self.bytes_of(arena, 1)
            assert await self.put(tier, 2) == [None]

    @pytest.mark.anyio
    @pytest.mark.parametrize("opened", [True, False])
    @pytest.mark.parametrize("how", ["deleted", "cut short", "emptied", "replaced"])
    async def test_a_segment_that_somebody_touched(self, ctx, tmp_path, clock, arena, how, opened):
        """Its objects are misses, the others hits; what is put later is there after a restart."""
        folder = tmp_path / "disk"
        tier = self.make(ctx, tmp_path, clock)
        await tier.open()
        await self.put(tier, *range(8))
        if not opened:
            tier._store._segments.files.close()
        path = folder / "segment-00001.slab"
        if how == "deleted":
            path.unlink()
        elif how == "replaced":
            path.unlink()
            path.write_bytes(os.urandom(2 * SIZE))
        else:
            os.truncate(path, PAGE if how == "cut short" else 0)
        kept = {}
        for seed in range(8):
            got = await self.get(tier, seed)
            assert got in (self.bytes_of(arena, seed), Lost.ABSENT, Lost.CORRUPT)
            kept[seed] = isinstance(got, bytes)
            assert kept[seed] == isinstance(await self.get(tier, seed), bytes)
        still = 8 if opened and how in ("deleted", "replaced") else 6
        assert sum(kept.values()) == still
        assert tier.stat().objects == still
        await self.goes_on(ctx, tmp_path, clock, tier, *range(20, 28))

    @pytest.mark.anyio
    @pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
    async def test_a_segment_that_may_not_be_read(self, ctx, clock, arena, other_user):
        """Another user's, or somebody's chmod: it is set aside, and the others are served."""
        async with self.opened(ctx, other_user, clock) as tier:
            await self.put(tier, *range(8))
        (other_user / "disk" / "segment-00001.slab").chmod(0)
        async with self.opened(ctx, other_user, clock) as tier:
            there = [isinstance(await self.get(tier, seed), bytes) for seed in range(8)]
            assert there.count(True) == 6
            assert await self.put(tier, *range(20, 28)) == [None] * 8
            assert tier.stat().objects == 8
        assert (other_user / "disk" / "set-aside-strays" / "segment-00001.slab").exists()

    @pytest.mark.anyio
    async def test_an_expired_object_is_put_anew(self, ctx, tmp_path, clock, arena):
        """Also where one that came before it expires later: somebody set the clock back."""
        async with self.opened(ctx, tmp_path, clock, ttl=60.0) as tier:
            await self.put(tier, 1)
            clock.now -= 86400
            await self.put(tier, 2)
            clock.now += 61
            assert await self.get(tier, 2) is Lost.ABSENT
            assert await self.put(tier, 2) == [None]
            assert await self.get(tier, 2) == self.bytes_of(arena, 2)
            assert tier.stat()[:2] == (2, 2 * SIZE)
            missing = sum(n for _, n in tier._store._segments.missing())
            assert tier._store._space.used == 2 * SIZE + missing


def test_a_child_keeps_no_folder_from_others(tmp_path):
    """Of one that is forked by Python nothing is left of the lock, whatever becomes of its parent;
    from one that was not, releasing it takes the lock as well."""
    lock = FolderLock(tmp_path, segment=SIZE)
    lives, tells = os.pipe()
    child = os.fork()
    if not child:
        os.write(tells, b"!")
        signal.alarm(60)
        signal.pause()
    assert os.read(lives, 1) == b"!"
    try:
        os.close(lock._fd)  # as when the parent is killed
        lock._fd = -1
        again = FolderLock(tmp_path, segment=SIZE)
        beside = os.dup(again._fd)  # as a child has it
        again.release()
        FolderLock(tmp_path, segment=SIZE).release()
        os.close(beside)
    finally:
        os.close(lives)
        os.close(tells)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.anyio
async def test_the_wall_clock_is_set(monkeypatch, tmp_path):
    """A day back or a year forward: nothing is forgotten, nothing is kept for longer."""
    import time

    from tierloom.stages.tiers.disk.steady_clock import steady_time

    before = steady_time()
    assert abs(before - time.time()) < 5
    for step in (-86400, 365 * 86400):
        monkeypatch.setattr(time, "time", lambda step=step: before + step)
        assert 0 <= steady_time() - before < 60
