"""gds: the contract of files, by kvikio. Run by `test_gds.py` in kvikio's environment."""

from __future__ import annotations

import os

import pytest

from tierloom.stages.errors import BadObject, Lost, TierDown
from tierloom.stages.tiers.files.gds import Gds, GdsOptions, KvikioFileIO
from tierloom.testing import SIZE, TierContract, key_of


class TestGds(TierContract):
    def make(self, ctx, folder, clock, **options):
        return Gds(GdsOptions(path=str(folder / "kv"), **options), ctx, clock=clock)

    def damage(self, tier, key, change):
        raw = bytearray(tier._path(key).read_bytes())
        change(raw)
        tier._path(key).write_bytes(raw)

    @pytest.mark.anyio
    async def test_kvikio_moves_the_bytes(self, ctx, tmp_path, clock, arena, monkeypatch):
        moved = []
        go = KvikioFileIO._go

        def noted(self, verb, fd, view, at):
            moved.append((verb, len(view)))
            return go(self, verb, fd, view, at)

        async with self.opened(ctx, tmp_path, clock, threads=3, task=64 << 10) as tier:
            monkeypatch.setattr(KvikioFileIO, "_go", noted)
            await self.put(tier, 1, tokens=1024)
            assert await self.get(tier, 1, 1024) == self.bytes_of(arena, 1, 1024)
        nbytes = 4096 + 3 * 16 * 16384
        assert moved == [("pwrite", nbytes), ("pread", 4096), ("pread", nbytes - 4096)]

    @pytest.mark.anyio
    async def test_it_is_said_once_what_moves_them(self, ctx, tmp_path, clock, caplog):
        caplog.set_level("INFO")
        async with self.opened(ctx, tmp_path, clock) as tier:
            await tier.open()
        told = [r for r in caplog.records if "moves bytes" in r.getMessage()]
        assert [r.cufile for r in told] == [False]

    @pytest.mark.anyio
    async def test_no_descriptor_is_left_open(self, tier):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            await self.put(tier, *range(8))
            for seed in range(8):
                await self.get(tier, seed)
            await tier.clear()
        assert len(os.listdir("/proc/self/fd")) == before

    @pytest.mark.anyio
    async def test_no_space(self, tier, monkeypatch):
        def full(*_):
            raise OSError(28, "no space left")

        monkeypatch.setattr(os, "posix_fallocate", full)
        assert await self.put(tier, 1) == [Lost.NO_ROOM]
        assert tier.stat()[:2] == (0, 0)
        assert await tier.exists([key_of(1)]) == [False]

    @pytest.mark.anyio
    async def test_files_that_end_or_cannot_be_read(self, tier, tmp_path):
        (tmp_path / "short").write_bytes(bytes(SIZE))
        file_io = tier._kvikio
        fd = file_io.open(tmp_path / "short", os.O_RDONLY)
        with pytest.raises((BadObject, TierDown)):
            file_io.read(fd, memoryview(bytearray(2 * SIZE)), 0)
        file_io.read(fd, memoryview(bytearray(SIZE)), 0)
        with pytest.raises(TierDown, match="pwrite failed"):
            file_io._go("pwrite", fd, memoryview(bytearray(SIZE)), 0)
        file_io.close(fd)
