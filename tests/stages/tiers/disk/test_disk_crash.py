"""disk: killed at any moment, and a log cut or damaged at any byte: never a wrong object."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tierloom.stages.errors import BadObject
from tierloom.stages.tiers.disk.index_log import IndexLog
from tierloom.stages.tiers.disk.tier import Disk, DiskOptions
from tierloom.testing import SIZE, TierBench, key_of

CAPACITY = 6 * SIZE

CHILD = """
import anyio
from tierloom import testing
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.tier import TierContext
from tierloom.stages.tiers.disk import index_log
from tierloom.stages.tiers.disk.tier import Disk, DiskOptions

index_log._SMALL_LOG = 3000  # a snapshot every few puts

async def main():
    arena = Arena(64 * testing.SIZE, huge_pages=False)
    ctx = TierContext(arena, testing.NAMESPACE, testing.Pool())
    tier = Disk(DiskOptions(path={path!r}, capacity={capacity}, keep_free=0, segment=1 << 17), ctx)
    await tier.open()
    print("open", flush=True)
    bench = testing.TierBench()
    for turn in range(100_000):
        await bench.put(tier, *(seed % 50 for seed in range(turn, turn + 3)))

anyio.run(main)
"""


def disk(folder: Path, ctx) -> Disk:
    options = DiskOptions(path=str(folder), capacity=CAPACITY, keep_free=0, segment=1 << 17)
    return Disk(options, ctx)


class TestCrash(TierBench):
    async def check(self, folder: Path, ctx, *, strict: bool) -> dict[int, bytes]:
        """Reopen and read everything; `strict`: whatever the index holds must be whole."""
        tier = disk(folder, ctx)
        await tier.open()
        found = {}
        try:
            for seed in range(50):
                known = (await tier.exists([key_of(seed)]))[0]
                try:
                    got = await self.get(tier, seed)
                except BadObject:  # a reader sees it, too, and computes again
                    assert not strict
                    continue
                if isinstance(got, bytes):
                    assert got == self.bytes_of(ctx.arena, seed)
                    found[seed] = got
                else:
                    assert not (strict and known)
            assert await self.put(tier, 77) == [None]
            assert await self.get(tier, 77) == self.bytes_of(ctx.arena, 77)
        finally:
            await tier.close()
        return found

    @pytest.mark.anyio
    @pytest.mark.parametrize("anyio_backend", ["asyncio"])
    async def test_killed_at_any_moment(self, ctx, tmp_path):
        folder, rng = tmp_path / "disk", random.Random(0)
        code = CHILD.format(path=str(folder), capacity=CAPACITY)
        for _ in range(6):
            _run_and_kill(code, rng.uniform(0.0, 0.12))
            await self.check(folder, ctx, strict=True)

    async def write(self, folder, ctx, seeds):
        """A folder as a killed process leaves it: a snapshot, and a log that goes on from it."""
        tier = disk(folder / "live", ctx)
        await tier.open()
        await self.put(tier, 0, 1)
        tier._store._snapshot()
        for seed in seeds:
            await self.put(tier, seed)
        await tier.delete([key_of(1)])
        shutil.copytree(folder / "live", folder / "dead")
        await tier.close()
        return folder / "dead", max((folder / "dead").glob("index-*.log"))

    @pytest.mark.anyio
    @pytest.mark.parametrize("anyio_backend", ["asyncio"])
    async def test_log_cut_at_every_byte(self, ctx, tmp_path):
        """No space is used again here: survivors are whole, records are lost from the end only."""
        dead, log = await self.write(tmp_path, ctx, [2, 3])
        raw = log.read_bytes()
        most = 0
        for cut in range(len(raw) + 1):
            log.write_bytes(raw[:cut])
            keys = _replayed(dead)
            assert {key_of(0)} <= keys  # of the snapshot
            most = max(most, len(keys))
            if cut % 61 == 0 or cut == len(raw):
                shutil.copytree(dead, tmp_path / "copy")
                found = await self.check(tmp_path / "copy", ctx, strict=True)
                assert {key_of(seed) for seed in found} == keys
                shutil.rmtree(tmp_path / "copy")
        assert most == 4
        assert _replayed(dead) == {key_of(0), key_of(2), key_of(3)}

    @pytest.mark.anyio
    @pytest.mark.parametrize("anyio_backend", ["asyncio"])
    async def test_log_cut_after_space_was_used_again(self, ctx, tmp_path):
        """What a power cut can do: the data is newer than the index. Readers are never deceived."""
        dead, log = await self.write(tmp_path, ctx, range(2, 12))
        raw = log.read_bytes()
        for cut in [*range(0, len(raw), 97), len(raw)]:
            log.write_bytes(raw[:cut])
            shutil.copytree(dead, tmp_path / "copy")
            await self.check(tmp_path / "copy", ctx, strict=False)
            shutil.rmtree(tmp_path / "copy")

    @pytest.mark.anyio
    @pytest.mark.parametrize("anyio_backend", ["asyncio"])
    async def test_damaged_log(self, ctx, tmp_path):
        """One bit turned anywhere: what follows is forgotten, what is believed is right."""
        dead, log = await self.write(tmp_path, ctx, [2, 3])
        raw, rng = log.read_bytes(), random.Random(0)
        for at in range(0, len(raw), 7):
            bad = bytearray(raw)
            bad[at] ^= 1 << rng.randrange(8)
            log.write_bytes(bad)
            keys = _replayed(dead)
            assert {key_of(0)} <= keys <= {key_of(s) for s in range(4)}

    @pytest.mark.anyio
    @pytest.mark.parametrize("anyio_backend", ["asyncio"])
    async def test_unknown_and_overlapping_records(self, ctx, tmp_path, caplog):
        from tierloom.stages.tiers.disk.index_log import _framed, _pack_put

        dead, log = await self.write(tmp_path, ctx, [2, 3])
        entries = {e.key: e for e in IndexLog(_copied(dead, tmp_path / "peek")).load()}
        false = entries[key_of(2)]
        links = b"".join(bytes([i]) * 32 for i in range(4))
        false.key, false.links = links[-32:], links
        with log.open("ab") as file:
            file.write(_framed(b"\x63 of a newer version"))
            file.write(_framed(_pack_put(false)))  # claims the place of object 2
        found = await self.check(dead, ctx, strict=True)
        assert set(found) == {0, 3}
        assert "objects forgotten" in caplog.text


def _run_and_kill(code: str, seconds: float) -> None:
    """A process that puts until it is killed, `seconds` after it opened its tier."""
    with subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"open\n"
        time.sleep(seconds)
        child.send_signal(signal.SIGKILL)


def _copied(folder: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    for path in folder.glob("index-*"):
        shutil.copy(path, to)
    return to


def _replayed(folder: Path) -> set[bytes]:
    """The keys that the index files tell of."""
    journal = IndexLog(_copied(folder, folder.parent / "replay"))
    try:
        return {entry.key for entry in journal.load()}
    finally:
        journal.close()
