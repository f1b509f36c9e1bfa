"""mock, blackhole and audit: the contract as far as each promises it, and what is its own."""

from __future__ import annotations

import logging

import anyio
import pytest

from tierloom.pipeline.config.explain import explain
from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.config.problems import ConfigProblems
from tierloom.stages.errors import Lost
from tierloom.stages.tiers.contract.tier import Inner, Read
from tierloom.stages.tiers.disk.tier import Disk, DiskOptions
from tierloom.stages.tiers.files.space import FilesOptions
from tierloom.stages.tiers.files.tier import Files
from tierloom.stages.tiers.wrappers.audit import Audit, AuditOptions
from tierloom.stages.tiers.wrappers.blackhole import Blackhole, BlackholeOptions
from tierloom.stages.tiers.wrappers.mock import Mock, MockOptions
from tierloom.testing import (
    ALL,
    FRAMES,
    NAMESPACE,
    SIZE,
    TierBench,
    TierContract,
    key_of,
    links_of,
    make_object,
)


def kept_by(mock: Mock, key: bytes) -> bytearray:
    return mock._kept[f"{NAMESPACE.hex()[:32]}/{key.hex()}"]


class TestMock(TierContract):
    ttl = False

    def make(self, ctx, folder, clock, **options):
        return Mock(MockOptions(**({"latency": 0.0, "bandwidth": 1 << 40} | options)), ctx)

    def damage(self, tier, key, change):
        change(kept_by(tier, key))

    @pytest.mark.anyio
    async def test_what_is_kept_is_a_copy(self, tier, arena):
        obj = make_object(arena, 1)
        await tier.put([obj])
        obj.lease.view[5000] ^= 1
        obj.lease.release()
        assert await self.get(tier, 1) == self.bytes_of(arena, 1)

    @pytest.mark.anyio
    async def test_loss(self, ctx, tmp_path, clock):
        async with self.opened(ctx, tmp_path, clock, loss=0.3, seed=1) as tier:
            await self.put(tier, *range(40))
            got = [await self.get(tier, seed) for seed in range(40)]
            lost = [seed for seed, data in enumerate(got) if data is Lost.ABSENT]
            assert 4 < len(lost) < 20
            assert tier.stat().objects == 40 - len(lost)
            assert await tier.exists([key_of(seed) for seed in lost]) == [False] * len(lost)

    @pytest.mark.anyio
    async def test_far_away(self, ctx, tmp_path, clock):
        """Objects wait for the line one after another, for the answer all at once."""
        waits = []

        async def sleep(seconds):
            waits.append(seconds)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(anyio, "sleep", sleep)
            patch.setattr(anyio, "current_time", lambda: 100.0)
            tier = self.make(ctx, tmp_path, clock, latency=2.0, bandwidth=SIZE)
            await tier.put([])
            await tier.exists([key_of(1), key_of(2)])
            for _ in range(2):
                assert await tier.put_value("x", bytearray(SIZE))
        assert waits == [2.0, 2.0, 3.0, 4.0]


class TestBlackhole(TierBench):
    @pytest.mark.anyio
    async def test_takes_everything_and_keeps_nothing(self, ctx, arena):
        tier = Blackhole(BlackholeOptions(), ctx)
        await tier.open()
        assert await self.put(tier, 1, 2) == [None, None]
        assert (tier.counts.puts, tier.counts.bytes_in) == (2, 2 * SIZE)
        assert tier.find(links_of(1)) is None
        assert await tier.exists([key_of(1)]) == [False]
        assert await self.get(tier, 1) is Lost.ABSENT
        assert tier.counts.misses == 1
        assert tier.stat() == (0, 0, 0)
        assert tier.pin([key_of(1)]) == await tier.delete([key_of(1)]) == await tier.clear() == 0
        obj = make_object(arena, 1)
        obj.sealed = False
        with pytest.raises(ValueError, match="sealed"):
            await tier.put([obj])
        obj.lease.release()
        await tier.close()


class TestAuditOfFiles(TierContract):
    def make(self, ctx, folder, clock, **options):
        inner = FilesOptions(path=str(folder / "kv"), **options)
        tier = Audit(AuditOptions(of=Inner("files", Files, inner)), ctx)
        tier.wrap(Files(inner, ctx, clock=clock))
        return tier

    def damage(self, tier, key, change):
        path = tier.tier._path(key)
        raw = bytearray(path.read_bytes())
        change(raw)
        path.write_bytes(raw)

    @pytest.mark.anyio
    async def test_every_call_is_logged(self, ctx, tmp_path, clock, caplog):
        with caplog.at_level(logging.INFO, "tierloom.stages.tiers.wrappers.audit"):
            async with self.opened(ctx, tmp_path, clock) as tier:
                await self.put(tier, 1, 2)
                await tier.exists([key_of(1), key_of(9)])
                await self.get(tier, 9)
                await tier.delete([key_of(1)])
                await tier.clear()
                with pytest.raises(AttributeError):
                    await tier.put([None])
        told = [r.message.replace(key_of(9).hex()[:16], "KEY") for r in caplog.records]
        words = [" ".join(w for w in m.split() if w != "ms:" and "." not in w) for m in told]
        assert words == [
            "files: open in done", "files: put of 2 in done", "files: has of 2 in 1 are there",
            "files: read of 1 in KEY ABSENT", "files: drop of 1 in 1 were there",
            "files: clear in 1 were there", "files: close in done",
        ]  # fmt: skip


class TestAuditOfDisk(TierContract):
    def make(self, ctx, folder, clock, *, capacity=64 * SIZE, **options):
        inner = DiskOptions(
            path=str(folder), capacity=capacity, keep_free=0, segment=1 << 20, **options
        )
        tier = Audit(AuditOptions(of=Inner("disk", Disk, inner)), ctx)
        tier.wrap(Disk(inner, ctx, clock=clock))
        return tier


class TestDifferences(TierBench):
    """A store that checks no frames, as `mock` does not."""

    def make(self, ctx, folder, clock, **options):
        return Audit(AuditOptions(of=Inner("mock", Mock, MockOptions(latency=0.0))), ctx)

    @pytest.mark.anyio
    @pytest.mark.parametrize("at", [4096, 20480 + 100, SIZE - 1])
    async def test_out(self, tier, arena, caplog, at):
        await self.put(tier, 1, 2)
        kept_by(tier.tier, key_of(1))[at] ^= 1
        assert await self.get(tier, 1) is Lost.CORRUPT
        assert await self.get(tier, 2) == self.bytes_of(arena, 2)
        assert await self.get(tier, 1) is Lost.ABSENT
        assert (tier.counts.extra["differ_out"], tier.counts.corrupt) == (1, 1)
        (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
        frame = (at - 4096) // 16384
        assert record.message.endswith(f"on its way out: the checksum of frame {frame} differs")

    @pytest.mark.anyio
    async def test_in(self, tier, arena):
        bad, good = make_object(arena, 1), make_object(arena, 2)
        bad.lease.view[5000] ^= 1
        assert await tier.put([bad, good]) == [Lost.CORRUPT, None]
        assert await tier.exists([key_of(1), key_of(2)]) == [False, True]
        assert tier.counts.extra == {"differ_in": 1, "differ_out": 0}
        bad.lease.release()
        good.lease.release()

    @pytest.mark.anyio
    async def test_what_a_reader_holds_stays_his(self, ctx, tmp_path, clock, arena):
        """Damage that comes with a later frame: the object is lost, its lease is the reader's."""
        inner = FilesOptions(path=str(tmp_path))
        tier = Audit(AuditOptions(of=Inner("files", Files, inner)), ctx)
        await tier.open()
        await self.put(tier, 1)
        read = Read(key_of(1), 1)
        await tier.read([read])
        path = tier.tier._path(key_of(1))
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
        again = Read(key_of(1), ALL, read.object)
        await tier.read([again])
        assert again.lost is Lost.CORRUPT
        assert again.object is read.object
        assert read.object.loaded == FRAMES
        assert not path.exists()
        read.object.lease.release()
        await tier.close()


AUDITED = """
version: 1
tiers:
  hot: {use: memory, capacity: 1 MiB}
  cold: {use: audit, of: %s, timeout: 1 s}
graphs:
  store:
    stages:
      keys: {use: hash}
      plan: {use: lookup, want: absent}
      pack: {use: gather}
      host: {use: to_host}
      hot:  {use: put, tier: hot}
      cold: {use: put, tier: cold}
"""


@pytest.fixture
def audited(tmp_path):
    def check(of: str, **overrides: object):
        file = tmp_path / "p.yaml"
        file.write_text(AUDITED.strip() % of)
        return load_config(file, {k.replace("__", "."): v for k, v in overrides.items()})

    return check


def test_the_inner_tier_is_written_like_any(audited):
    for of in ("{use: files, path: /mnt/kv, ttl: 1 h}", "{use: 'file:///mnt/kv', ttl: 1 h}"):
        spec = audited(of)
        inner = spec.tiers["cold"].options.of
        assert (inner.use, inner.cls, inner.options.ttl) == ("files", Files, 3600.0)
        assert "cold: audit of (files path /mnt/kv, ttl 3600 s)" in explain(spec)
    spec = audited("{use: files, path: /a}", tiers__cold__of__ttl="5 s")
    assert spec.tiers["cold"].options.of.options == FilesOptions(path="/a", ttl=5.0)


@pytest.mark.parametrize(
    ("of", "place", "message"),
    [
        ("{use: files, pth: /x}", "4:39", "unknown key 'pth'"),
        ("{use: files}", "4:22", "option 'path' is missing"),
        ("{use: flies, path: /x}", "4:32", "no tier is called 'flies'"),
        ("fiel:///x", "4:26", "no tier has URLs that begin with fiel://"),
        ("files", "4:26", "wants a tier, got 'files'"),
        ("{use: memory, capacity: 1 MiB}", "4:3",
         "'memory' keeps objects in place, so there are no transfers to check"),
    ],
)  # fmt: skip
def test_problems_of_the_inner_tier_have_their_place(audited, of, place, message):
    with pytest.raises(ConfigProblems) as caught:
        audited(of)
    assert (place, message) in [(f"{p.line}:{p.col}", p.message) for p in caught.value.problems]


@pytest.mark.parametrize(
    "options", [{"capacity": 0}, {"latency": -1.0}, {"loss": 1.5}, {"bandwidth": -1}]
)
def test_bad_options(options):
    with pytest.raises(ValueError):
        MockOptions(**options)
