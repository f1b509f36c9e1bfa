"""What may lie in a disk tier's folder: nothing of it stops an engine from starting."""

from __future__ import annotations

from pathlib import Path

import pytest

from tierloom.stages.errors import ConfigError, Lost
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.tiers.disk.folder_lock import FolderLock
from tierloom.stages.tiers.disk.tier import Disk, DiskOptions
from tierloom.testing import SIZE, TierBench

SEGMENT = 5 * PAGE


class TestFolder(TierBench):
    def make(self, ctx, folder, clock, **options):
        given = {"segment": SEGMENT, "keep_free": 0, "capacity": 32 * SIZE} | options
        return Disk(DiskOptions(path=str(folder / "disk"), **given), ctx, clock=clock)

    @pytest.mark.anyio
    @pytest.mark.parametrize(
        ("text", "label"),
        [
            ("", "damaged"), ("{}", "damaged"), ("no json", "damaged"), ("[1]", "damaged"),
            ("[" * 100_000, "damaged"), ("\0" * 4096, "damaged"),
            ('{"format": "tierloom disk tier", "version": 1, "segment": 0}', "damaged"),
            ('{"format": "tierloom disk tier", "version": 1, "segment": 1e999}', "damaged"),
            ('{"format": "tierloom disk tier", "version": 2}', "version-2"),
        ],
        ids=range(9),
    )  # fmt: skip
    async def test_a_folder_that_cannot_be_used_is_set_aside(
        self, ctx, tmp_path, clock, caplog, text, label
    ):
        folder = tmp_path / "disk"
        for _ in range(2):  # what was set aside before makes room
            async with self.opened(ctx, tmp_path, clock) as tier:
                await self.put(tier, 1, 2)
            (folder / "tierloom.json").write_text(text)
            (folder / "notes.txt").write_text("the user's")
            kept = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
            caplog.clear()
            async with self.opened(ctx, tmp_path, clock) as tier:
                assert tier.stat().objects == 0
                assert await self.put(tier, 1) == [None]
                assert isinstance(await self.get(tier, 1), bytes)
            (said,) = [r.getMessage() for r in caplog.records if "delete it" in r.getMessage()]
            assert str(folder) in said
            assert label.replace("-", " ") in said
            there = {p.name: p.read_bytes() for p in (folder / f"set-aside-{label}").iterdir()}
            assert there == {n: kept[n] for n in kept.keys() - {"lock", "notes.txt"}}
        assert [p.name for p in folder.iterdir() if p.is_dir()] == [f"set-aside-{label}"]

    @pytest.mark.anyio
    async def test_files_that_are_none_of_ours(self, ctx, tmp_path, clock, arena):
        folder = tmp_path / "disk"
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, 1)
        others = ["segment-backup.slab", "segment-1.slab", "index-old.log", "index-7.snap"]
        for name in others:
            (folder / name).write_bytes(b"x")
        folders = ["index-00000099.snap", "index-00000001.tmp", "segment-00007.slab"]
        for name in folders:
            (folder / name).mkdir()
        async with self.opened(ctx, tmp_path, clock) as tier:
            assert await self.get(tier, 1) == self.bytes_of(arena, 1)
        assert all((folder / name).read_bytes() == b"x" for name in others)
        assert sorted(p.name for p in (folder / "set-aside-strays").iterdir()) == sorted(folders)

    @pytest.mark.anyio
    async def test_setting_aside_was_cut_short(self, ctx, tmp_path, clock, monkeypatch):
        folder = tmp_path / "disk"
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, 1)
        (folder / "tierloom.json").write_text("")
        names = {p.name for p in folder.iterdir()} - {"lock"}
        rename = Path.rename

        def killed(path, to):
            if path.name.startswith("index"):
                raise OSError(5, "cut short")
            return rename(path, to)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", killed)
            with pytest.raises(ConfigError, match="cut short"):
                FolderLock(folder, segment=SEGMENT)
        async with self.opened(ctx, tmp_path, clock) as tier:
            assert await self.put(tier, 1) == [None]
        assert {p.name for p in (folder / "set-aside-damaged").iterdir()} == names

    @pytest.mark.anyio
    @pytest.mark.parametrize("fits", [True, False])
    async def test_a_folder_whose_marker_is_gone(self, ctx, tmp_path, clock, arena, fits):
        """It is gone on with as long as its segments can be of the size that we would begin."""
        folder = tmp_path / "disk"
        async with self.opened(ctx, tmp_path, clock, segment=2 * SIZE) as tier:
            await self.put(tier, *range(5))
        (folder / "tierloom.json").unlink()
        segment = 2 * SIZE if fits else SIZE
        async with self.opened(ctx, tmp_path, clock, segment=segment) as tier:
            assert tier.stat().objects == (5 if fits else 0)
            await self.put(tier, 7)
            assert await self.get(tier, 7) == self.bytes_of(arena, 7)
            assert await self.get(tier, 1) == (self.bytes_of(arena, 1) if fits else Lost.ABSENT)
        assert (folder / "set-aside-unmarked").exists() is not fits

    @pytest.mark.anyio
    async def test_records_of_a_later_index_are_passed_over(self, ctx, tmp_path, clock, arena):
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, 1)
            for body in (b"\x01", b"\x01" + bytes(14), b"\x63later"):
                tier._store._index_log._append(body)
            await self.put(tier, 2)
        async with self.opened(ctx, tmp_path, clock) as tier:
            for seed in (1, 2):
                assert await self.get(tier, seed) == self.bytes_of(arena, seed)
