"""files: the contract, and a folder that others write to as well."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import time
from inspect import signature
from types import SimpleNamespace

import anyio
import pytest

from tierloom.stages.errors import ConfigError, Lost, TierDown
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.tier import Read, TierContext
from tierloom.stages.tiers.disk.steady_clock import steady_time
from tierloom.stages.tiers.disk.tier import Disk
from tierloom.stages.tiers.files.gds import Gds
from tierloom.stages.tiers.files.space import FilesOptions
from tierloom.stages.tiers.files.tier import Files
from tierloom.stages.tiers.nixl.tier import Nixl
from tierloom.testing import ALL, SIZE, TierContract, encrypted_anew, key_of


class TestFiles(TierContract):
    def make(self, ctx, folder, clock, **options):
        return Files(FilesOptions(path=str(folder / "kv"), **options), ctx, clock=clock)

    def damage(self, tier, key, change):
        raw = bytearray(tier._path(key).read_bytes())
        change(raw)
        tier._path(key).write_bytes(raw)

    @pytest.mark.anyio
    async def test_two_hosts(self, ctx, tmp_path, clock, arena):
        async with (
            self.opened(ctx, tmp_path, clock) as one,
            self.opened(ctx, tmp_path, clock, fsync=True) as two,
        ):
            async with anyio.create_task_group() as group:
                for tier in (one, two):
                    group.start_soon(self.put, tier, *range(8))
            for seed in range(8):
                assert await self.get(one, seed) == self.bytes_of(arena, seed)
                assert await self.get(two, seed) == self.bytes_of(arena, seed)
            assert await two.delete([key_of(1)]) == 1
            assert await one.exists([key_of(1)]) == [False]
            assert not list(tmp_path.glob("**/*.tmp"))

    @pytest.mark.anyio
    async def test_namespaces_are_apart(self, ctx, tmp_path, clock):
        other = TierContext(ctx.arena, b"o" * 32, ctx.pool)
        async with (
            self.opened(ctx, tmp_path, clock) as one,
            self.opened(other, tmp_path, clock) as two,
        ):
            await self.put(one, 1)
            assert await two.exists([key_of(1)]) == [False]
            assert await two.clear() == 0
            two._path(key_of(1)).parent.mkdir()
            two._path(key_of(1)).write_bytes(one._path(key_of(1)).read_bytes())
            for _ in range(2):  # whole, and somebody's: it stays
                assert await self.get(two, 1) is Lost.FOREIGN
            assert two.counts.corrupt == 0

    @pytest.mark.anyio
    async def test_what_was_used_longest_ago_is_pruned(self, ctx, tmp_path, clock):
        clock.now -= 1000
        async with self.opened(ctx, tmp_path, clock, capacity=4 * SIZE) as tier:
            for seed in range(4):
                await self.put(tier, seed)
                os.utime(tier._path(key_of(seed)), (clock.now, clock.now))
                clock.now += 10
            assert isinstance(await self.get(tier, 0), bytes)
            await self.put(tier, 9)
            assert (await tier.exists([key_of(s) for s in (0, 1, 9)])) == [True, False, True]

    @pytest.mark.anyio
    @pytest.mark.parametrize("what", ["what is in it", "the folder"])
    async def test_a_folder_that_somebody_emptied(self, ctx, tmp_path, clock, what):
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, 1)
            for path in (tmp_path / "kv").iterdir() if what != "the folder" else [tmp_path / "kv"]:
                shutil.rmtree(path)
            assert await self.get(tier, 1) is Lost.ABSENT
            assert await self.put(tier, 1, 2) == [None, None]
            assert isinstance(await self.get(tier, 1), bytes)

    @pytest.mark.anyio
    async def test_a_mount_that_is_gone_is_not_filled(self, ctx, tmp_path, clock):
        """Its empty mount point is a folder of another file system."""
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, 1)
            shutil.rmtree(tmp_path / "kv")
            tier._device += 1
            with pytest.raises(TierDown, match="another file system is mounted there"):
                await self.put(tier, 2)
            assert not (tmp_path / "kv").exists()
            tier._device -= 1

    @pytest.mark.anyio
    async def test_others_fill_the_folder_too(self, ctx, tmp_path, clock):
        async with self.opened(ctx, tmp_path, clock) as other:
            await self.put(other, *range(6))
        async with self.opened(ctx, tmp_path, clock, capacity=3 * SIZE) as tier:
            assert tier.stat().nbytes <= 3 * SIZE

    @pytest.mark.anyio
    async def test_half_written_files_are_swept_when_old(self, ctx, tmp_path, clock):
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, 1)
            folder = tier._path(key_of(1)).parent
        for name, age in (("old", 7200), ("new", 60)):
            (folder / f"{name}.tmp").write_bytes(b"half")
            os.utime(folder / f"{name}.tmp", (time.time() - age,) * 2)
        async with self.opened(ctx, tmp_path, clock):
            assert [path.name for path in folder.glob("*.tmp")] == ["new.tmp"]

    @pytest.mark.anyio
    @pytest.mark.parametrize("content", [b"", b"short", b"x" * 4096, b"TLM1" + b"\0" * 8188])
    async def test_foreign_files(self, ctx, tmp_path, clock, content):
        async with self.opened(ctx, tmp_path, clock) as tier:
            path = tier._path(key_of(1))
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
            assert await self.get(tier, 1) is Lost.CORRUPT
            assert not path.exists()

    @pytest.mark.anyio
    @pytest.mark.parametrize("length", ["as before", "another"])
    async def test_another_object_took_the_place(self, tier, arena, length):
        """Between two layers a file was replaced: what came is not to blame, and not mixed."""
        await self.put(tier, 1)
        read = Read(key_of(1), 1)
        await tier.read([read])
        path = tier._path(key_of(1))
        if length == "another":
            path.write_bytes(bytes(2 * SIZE + 4096 - 2 * SIZE % 4096))
        else:
            await tier.delete([key_of(1)])
            other = encrypted_anew(arena, 1)
            assert await tier.put([other]) == [None]
            other.lease.release()
        again = Read(key_of(1), ALL, read.object)
        await tier.read([again])
        assert again.lost is Lost.ABSENT
        assert path.exists()
        read.object.lease.release()

    @pytest.mark.anyio
    async def test_no_space(self, tier, arena, monkeypatch):
        def full(*_):
            raise OSError(28, "no space left")

        monkeypatch.setattr(os, "pwritev", full)
        assert await self.put(tier, 1) == [Lost.NO_ROOM]
        assert tier.stat()[:2] == (0, 0)
        assert await tier.exists([key_of(1)]) == [False]

    @pytest.mark.anyio
    @pytest.mark.parametrize("what", ["folder", "pipe", "link"])
    async def test_what_is_no_file_has_the_name(self, ctx, tmp_path, clock, what):
        """It is somebody's: a miss that stays, also for who puts, and nobody waits for a pipe."""
        async with self.opened(ctx, tmp_path, clock) as tier:
            path = tier._path(key_of(1))
            path.parent.mkdir(parents=True)
            {
                "folder": path.mkdir,
                "pipe": lambda: os.mkfifo(path),
                "link": lambda: path.symlink_to(tmp_path),
            }[what]()
            for _ in range(2):
                assert await self.get(tier, 1) is Lost.FOREIGN
            assert await self.put(tier, 1, 2) == [None, None]
            assert isinstance(await self.get(tier, 2), bytes)
            assert path.exists()

    @pytest.mark.anyio
    @pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
    async def test_a_file_that_may_not_be_read(self, ctx, clock, other_user):
        """Another user's: a miss of that object, and no failure of the tier."""
        async with self.opened(ctx, other_user, clock) as tier:
            await self.put(tier, 1, 2)
            tier._path(key_of(1)).chmod(0)
            read = Read(key_of(1), ALL)
            await tier.read([read])
            assert read.lost is Lost.FOREIGN
            assert "Permission denied; users who share a folder set mode: 0770" in str(read.why)
            assert await tier.exists([key_of(1)]) == [True]
            assert await self.put(tier, 1) == [None]
            assert isinstance(await self.get(tier, 2), bytes)

    @pytest.mark.anyio
    @pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
    @pytest.mark.parametrize("mode", [None, "0770"])
    async def test_two_users_share_a_folder(self, ctx, clock, arena, other_user, mode):
        """Of one group; whatever the umask is."""
        os.seteuid(0)
        os.setegid(0)
        clock.now -= 50
        umask = os.umask(0o077)
        try:
            async with self.opened(ctx, other_user, clock, mode=mode) as tier:
                await self.put(tier, *range(4))
                assert (mode is None) == (tier._path(key_of(1)).stat().st_mode & 0o077 == 0)
                assert await self.get(tier, 1) == self.bytes_of(arena, 1)
            os.seteuid(other_user.stat().st_uid)  # still of the first one's group
            if mode is None:
                with pytest.raises((OSError, ConfigError)):
                    async with self.opened(ctx, other_user, clock) as tier:
                        await self.get(tier, 1)
                return
            async with self.opened(ctx, other_user, clock, mode=mode) as tier:
                for seed in range(4):
                    assert await self.get(tier, seed) == self.bytes_of(arena, seed)
                used = tier._path(key_of(1)).stat().st_mtime
                assert used > clock.now + 25, "a use that counts, by the system's clock"
                assert await tier.delete([key_of(2)]) == 1
                assert await self.put(tier, 2, *range(5, 9)) == [None] * 5
            os.seteuid(0)
            async with self.opened(ctx, other_user, clock, mode=mode) as tier:
                assert await tier.clear() == 8
        finally:
            os.umask(umask)

    @pytest.mark.anyio
    @pytest.mark.parametrize("step", [-86400, 365 * 86400])
    async def test_the_clock_is_set(self, ctx, tmp_path, clock, arena, step):
        """Forward: what is too old then is a miss; back: nothing is lost. Both go on."""
        async with self.opened(ctx, tmp_path, clock, ttl=3600.0, capacity=8 * SIZE) as tier:
            await self.put(tier, 1)
            clock.now += step
            assert await self.get(tier, 1) == (self.bytes_of(arena, 1) if step < 0 else Lost.ABSENT)
            assert await self.put(tier, 1, 2) == [None, None]
            for seed in (1, 2):
                assert await self.get(tier, seed) == self.bytes_of(arena, seed)

    @pytest.mark.anyio
    @pytest.mark.parametrize("step", [-86400, 365 * 86400])
    async def test_the_systems_clock_is_set(self, ctx, tmp_path, arena, monkeypatch, step):
        """It is asked at the start only: no object is lost, or kept for longer."""
        options = FilesOptions(path=str(tmp_path / "kv"), ttl=3600.0, capacity=8 * SIZE)
        tier = Files(options, ctx)
        await tier.open()
        await self.put(tier, 1)
        began = time.time()
        monkeypatch.setattr(time, "time", lambda: began + step)
        assert await self.put(tier, 2) == [None]
        half = tier._path(key_of(1)).with_suffix(".tmp")
        half.write_bytes(b"half")
        tier._space.open()
        assert half.exists()
        for seed in (1, 2):
            assert await self.get(tier, seed) == self.bytes_of(arena, seed)
            assert abs(tier._path(key_of(seed)).stat().st_mtime - began) < 600
        os.utime(tier._path(key_of(1)), (began - 3601,) * 2)
        assert await self.get(tier, 1) is Lost.ABSENT

    @pytest.mark.anyio
    async def test_no_file_can_be_opened(self, ctx, tmp_path, clock, arena, caplog):
        """The process has too many: misses, one line, and it goes on when it has some to spare."""
        limits = SimpleNamespace(timeout=30.0, fails=3, probe=0.0)
        tier = CircuitBreaker(self.make(ctx, tmp_path, clock), "cold", limits)
        await tier.open()
        await self.put(tier, 1)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        spare = [os.open(os.devnull, os.O_RDONLY)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare[0] + 1, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    spare.append(os.open(os.devnull, os.O_RDONLY))
            for _ in range(8):
                assert await self.get(tier, 1) is Lost.TIER_DOWN
                assert await self.put(tier, 2) == [Lost.TIER_DOWN]
        finally:
            for fd in spare:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert await self.get(tier, 1) == self.bytes_of(arena, 1)
        assert await self.put(tier, 2) == [None]
        said = [r.getMessage() for r in caplog.records if "Too many open files" in r.getMessage()]
        assert len(said) == 1, said

    @pytest.mark.anyio
    async def test_a_folder_we_may_not_write(self, ctx, tmp_path, clock):
        (tmp_path / "kv").write_text("a file")
        with pytest.raises(ConfigError, match="choose a folder with write permission"):
            await self.make(ctx, tmp_path, clock).open()


@pytest.mark.parametrize("tier", [Files, Gds, Nixl, Disk])
def test_ages_go_by_a_clock_that_nobody_sets(tier):
    assert signature(tier).parameters["clock"].default is steady_time


@pytest.mark.parametrize("options", [{"path": ""}, {"capacity": -1}, {"ttl": -1.0}, {"depth": 0}])
def test_bad_options(options):
    with pytest.raises(ValueError):
        FilesOptions(**({"path": "/x"} | options))
