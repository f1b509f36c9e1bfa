"""What every tier and every codec promises, as tests: subclass `TierContract` or `CodecContract`,
say how one is made, and they all run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tierloom.stages.arena import Arena
from tierloom.stages.codecs.shape import FrameShape, Site
from tierloom.stages.codecs.table import decode_frame
from tierloom.stages.errors import BadObject, Lost
from tierloom.stages.geometry import Geometry
from tierloom.stages.object import Header, Object, plan_frames
from tierloom.stages.payload import EncodedFrame
from tierloom.stages.tiers.base import Read, Tier, TierContext

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from tierloom.stages.codecs.encode import Encode
    from tierloom.stages.codecs.keyring import Keyring

ALL = 1 << 30
NAMESPACE = b"n" * 32
GEOMETRY = Geometry(kv=2, layers=6, heads=2, dim=16, dtype="bfloat16", block_tokens=1)
GRAIN, GROUP, FRAMES = 16, 2, 3
SIZE = 4096 + FRAMES * 16384
"""Bytes of an object of 64 tokens."""


def links_of(seed: int, tokens: int = 64) -> bytes:
    """Grain links of chunk `seed`; those of fewer tokens begin those of more."""
    grains = -(-tokens // GRAIN)
    return b"".join(hashlib.sha256(b"%d/%d" % (seed, i)).digest() for i in range(grains))


def key_of(seed: int, tokens: int = 64) -> bytes:
    return links_of(seed, tokens)[-32:]


def make_object(arena: Arena, seed: int, *, tokens: int = 64) -> Object:
    """A sealed object of random bytes, always the same for one seed. The caller has its lease."""
    raw = [GEOMETRY.frame_bytes(GROUP, tokens)] * FRAMES
    links = links_of(seed, tokens)
    header = Header(
        key=links[-32:], namespace=NAMESPACE, parent=b"p" * 32, token_digest=b"t" * 32,
        tokens=tokens, grain=GRAIN, group=GROUP, geometry=GEOMETRY,
        frames=plan_frames(4096, raw, raw), links=links,
    )  # fmt: skip
    obj = Object(header, arena.lease(header.nbytes))
    view = obj.lease.view[: header.nbytes]
    view[:] = random.Random(seed).randbytes(header.nbytes)
    frames = header.frames
    obj.seal([xxhash.xxh3_64_intdigest(view[f.offset : f.offset + f.stored]) for f in frames])
    return obj


def verify(obj: Object, key: bytes) -> bytes:
    """The object's bytes, checked as a reader checks them. Raises BadObject."""
    view = obj.lease.view
    header = Header.unpack(view, key=key, namespace=NAMESPACE)
    for frame in header.frames[: obj.loaded]:
        stored = view[frame.offset : frame.offset + frame.stored]
        if xxhash.xxh3_64_intdigest(stored) != frame.checksum:
            raise BadObject("frame checksum does not match")
    return bytes(view[: header.nbytes])


class Clock:
    """A clock that goes on when told."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


class Pool:
    """Threads, whose calls can be held back at a gate; abandoned calls go on."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.reached = threading.Event()

    async def __call__(self, fn: Callable[..., Any], *args: Any) -> Any:
        def run() -> Any:
            self.reached.set()
            assert self.gate.wait(30)
            return fn(*args)

        return await anyio.to_thread.run_sync(run, abandon_on_cancel=True)


class TierBench:
    """Fixtures and steps for tests of tiers: an arena that must be empty in the end, a pool."""

    def make(self, ctx: TierContext, folder: Path, clock: Clock, **options: Any) -> Tier:
        raise NotImplementedError

    @pytest.fixture(params=["asyncio", "trio"])
    def anyio_backend(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def arena(self) -> Iterator[Arena]:
        arena = Arena(64 * SIZE, 64 * SIZE, huge_pages=False)
        yield arena
        for _ in range(200):  # threads that were left behind bring theirs home
            if not arena.leases:
                break
            time.sleep(0.01)
        assert arena.leases == 0
        assert arena.flight == 0
        arena.close()

    @pytest.fixture
    def pool(self) -> Iterator[Pool]:
        pool = Pool()
        yield pool
        pool.gate.set()

    @pytest.fixture
    def ctx(self, arena: Arena, pool: Pool) -> TierContext:
        return TierContext(arena, NAMESPACE, pool)

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @contextlib.asynccontextmanager
    async def opened(
        self, ctx: TierContext, folder: Path, clock: Clock, **options: Any
    ) -> AsyncIterator[Tier]:
        tier = self.make(ctx, folder, clock, **options)
        await tier.open()
        try:
            yield tier
        finally:
            await tier.close()

    @pytest.fixture
    async def tier(
        self, ctx: TierContext, tmp_path: Path, clock: Clock, anyio_backend: str
    ) -> AsyncIterator[Tier]:
        async with self.opened(ctx, tmp_path, clock) as tier:
            yield tier

    async def put(self, tier: Tier, *seeds: int, tokens: int = 64) -> list[Lost | None]:
        """Put objects in one call; their leases stay with the tier only."""
        objects = [make_object(tier.ctx.arena, seed, tokens=tokens) for seed in seeds]
        try:
            return await tier.put(objects)
        finally:
            for obj in objects:
                obj.lease.release()

    async def get(self, tier: Tier, seed: int, tokens: int = 64) -> bytes | Lost:
        """The verified bytes of one object, or why there are none."""
        read = Read(key_of(seed, tokens), ALL)
        await tier.read([read])
        if read.object is None:
            assert read.lost is not None
            return read.lost
        try:
            assert read.lost is None
            assert read.object.loaded == FRAMES
            assert read.object.sealed
            return verify(read.object, read.key)
        finally:
            read.object.lease.release()

    def bytes_of(self, arena: Arena, seed: int, tokens: int = 64) -> bytes:
        obj = make_object(arena, seed, tokens=tokens)
        try:
            return bytes(obj.lease.view[: obj.header.nbytes])
        finally:
            obj.lease.release()


class TierContract(TierBench):
    """`make` builds a tier in `folder`; the attributes say which promises it makes."""

    local = False
    ttl = True
    bounded = True
    damage: Any = None
    """`damage(tier, key, change)` calls `change(bytearray)` on what is kept; it may be cut."""

    @pytest.mark.anyio
    async def test_what_was_put_comes_back(self, tier: Tier, arena: Arena) -> None:
        assert await self.put(tier, 1, 2, 3) == [None] * 3
        for seed in (3, 1, 2):
            assert await self.get(tier, seed) == self.bytes_of(arena, seed)
        assert tier.stat()[:2] == (3, 3 * SIZE)
        assert tier.counts.puts == 3
        assert tier.counts.hits == 3
        assert tier.counts.bytes_in == 3 * SIZE

    @pytest.mark.anyio
    async def test_absent_is_data(self, tier: Tier) -> None:
        assert await self.get(tier, 1) is Lost.ABSENT
        assert await tier.has([key_of(1)]) == [False]
        assert await tier.drop([key_of(1)]) == 0
        assert tier.counts.misses == 1

    @pytest.mark.anyio
    async def test_empty_batches(self, tier: Tier) -> None:
        assert await tier.has([]) == []
        assert await tier.put([]) == []
        await tier.read([])
        assert await tier.drop([]) == 0

    @pytest.mark.anyio
    async def test_one_bad_read_spoils_no_other(self, tier: Tier, arena: Arena) -> None:
        await self.put(tier, *range(0, 20, 2))
        reads = [Read(key_of(seed), ALL) for seed in range(20)]
        await tier.read(reads)
        for seed, read in enumerate(reads):
            if seed % 2:
                assert read.object is None
                assert read.lost is Lost.ABSENT
            else:
                assert read.object is not None
                assert verify(read.object, read.key) == self.bytes_of(arena, seed)
                read.object.lease.release()
        assert await tier.has([r.key for r in reads]) == [seed % 2 == 0 for seed in range(20)]

    @pytest.mark.anyio
    async def test_layer_by_layer(self, tier: Tier, arena: Arena) -> None:
        await self.put(tier, 1)
        read = Read(key_of(1), 1)
        await tier.read([read])
        held = read.object
        assert held is not None
        for upto in (1, 2, 2, FRAMES, ALL):
            read = Read(key_of(1), upto, held)
            await tier.read([read])
            assert read.lost is None
            assert read.object is held
            assert held.loaded >= min(upto, FRAMES)
            verify(held, read.key)
        assert held.sealed
        assert verify(held, key_of(1)) == self.bytes_of(arena, 1)
        held.lease.release()

    @pytest.mark.anyio
    async def test_gone_between_two_layers(self, tier: Tier) -> None:
        await self.put(tier, 1)
        read = Read(key_of(1), 1)
        await tier.read([read])
        held = read.object
        assert held is not None
        await tier.drop([key_of(1)])
        again = Read(key_of(1), ALL, held)
        await tier.read([again])
        assert again.lost is Lost.ABSENT or held.loaded == FRAMES
        verify(held, read.key)
        held.lease.release()

    @pytest.mark.anyio
    async def test_put_twice_keeps_one(self, tier: Tier, arena: Arena) -> None:
        assert await self.put(tier, 1) == [None]
        assert await self.put(tier, 1, 2) == [None, None]
        assert tier.stat()[:2] == (2, 2 * SIZE)
        assert await self.get(tier, 1) == self.bytes_of(arena, 1)

    @pytest.mark.anyio
    async def test_unsealed_objects_are_a_mistake(self, tier: Tier, arena: Arena) -> None:
        obj = make_object(arena, 1)
        obj.sealed = False
        with pytest.raises(ValueError, match="sealed"):
            await tier.put([obj])
        obj.lease.release()

    @pytest.mark.anyio
    async def test_drop_and_clear(self, tier: Tier) -> None:
        await self.put(tier, 1, 2, 3, 4)
        assert await tier.drop([key_of(1), key_of(9), key_of(2)]) == 2
        assert await tier.has([key_of(s) for s in (1, 2, 3, 4)]) == [False, False, True, True]
        assert await tier.clear() == 2
        assert await tier.clear() == 0
        assert tier.stat()[:2] == (0, 0)
        assert await self.put(tier, 1) == [None]

    @pytest.mark.anyio
    async def test_no_room_in_the_arena(self, tier: Tier, arena: Arena) -> None:
        await self.put(tier, 1)
        held = arena.lease(arena.working)
        got = await self.get(tier, 1)
        held.release()
        assert isinstance(got, bytes) if tier.in_arena else got is Lost.NO_ROOM

    @pytest.mark.anyio
    async def test_time_is_over(self, ctx: TierContext, tmp_path: Path, clock: Clock) -> None:
        if not self.ttl:
            pytest.skip("no ttl")
        async with self.opened(ctx, tmp_path, clock, ttl=60.0) as tier:
            await self.put(tier, 1)
            clock.now += 59
            assert await tier.has([key_of(1)]) == [True]
            clock.now += 2
            assert await tier.has([key_of(1)]) == [False]
            assert await self.get(tier, 1) is Lost.ABSENT
            if tier.local:
                assert tier.find(links_of(1)) is None
            assert await self.put(tier, 1) == [None]
            assert isinstance(await self.get(tier, 1), bytes)
            assert tier.stat().objects == 1

    @pytest.mark.anyio
    async def test_capacity_is_exact(self, ctx: TierContext, tmp_path: Path, clock: Clock) -> None:
        if not self.bounded:
            pytest.skip("unbounded")
        async with self.opened(ctx, tmp_path, clock, capacity=5 * SIZE) as tier:
            for seed in range(12):
                assert await self.put(tier, seed) == [None]
                assert tier.stat().nbytes <= 5 * SIZE
                kept = await tier.has([key_of(s) for s in range(12)])
                assert sum(kept) * SIZE == tier.stat().nbytes
                if tier.local:
                    assert sum(kept) == min(seed + 1, 5)
                assert kept[seed]
            assert tier.counts.evicted >= 7

    @pytest.mark.anyio
    async def test_larger_than_the_tier(
        self, ctx: TierContext, tmp_path: Path, clock: Clock
    ) -> None:
        if not self.bounded:
            pytest.skip("unbounded")
        async with self.opened(ctx, tmp_path, clock, capacity=SIZE - 4096) as tier:
            assert await self.put(tier, 1) == [Lost.NO_ROOM]
            assert await self.put(tier, 2, tokens=16) == [None]
            assert tier.counts.refused == 1

    @pytest.mark.anyio
    async def test_pins(self, ctx: TierContext, tmp_path: Path, clock: Clock) -> None:
        if not self.local:
            pytest.skip("cannot pin")
        async with self.opened(ctx, tmp_path, clock, capacity=4 * SIZE) as tier:
            await self.put(tier, 1, 2)
            assert tier.pin([key_of(1), key_of(2), key_of(9)]) == 2
            await self.put(tier, *range(10, 20))
            assert await tier.has([key_of(1), key_of(2)]) == [True, True]
            assert tier.pin([key_of(1)], pinned=False) == 1
            await self.put(tier, *range(20, 30))
            assert await tier.has([key_of(1), key_of(2)]) == [False, True]
            assert tier.pin([key_of(s) for s in range(20, 30)]) == 3
            assert await self.put(tier, 40) == [Lost.NO_ROOM]

    @pytest.mark.anyio
    async def test_inner_links(self, tier: Tier) -> None:
        if not self.local:
            with pytest.raises(NotImplementedError):
                tier.find(links_of(1))
            return
        await self.put(tier, 1)
        links = links_of(1)
        assert tier.find(links) == (key_of(1), 4, SIZE)
        other = links[:64] + links_of(2)[64:]
        assert tier.find(other) == (key_of(1), 2, SIZE)
        await self.put(tier, 1, tokens=32)  # a shorter one of its own is preferred
        assert tier.find(other) == (key_of(1, 32), 2, 4096 + FRAMES * 8192)
        assert tier.find(links_of(2)) is None
        await tier.drop([key_of(1)])
        assert tier.find(links) == (key_of(1, 32), 2, 4096 + FRAMES * 8192)

    @pytest.mark.anyio
    async def test_a_cancelled_put_is_whole_or_invisible(
        self, tier: Tier, arena: Arena, pool: Pool
    ) -> None:
        pool.gate.clear()
        pool.reached.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(self.put, tier, 1, 2)
            await _patient(pool.reached.is_set)
            group.cancel_scope.cancel()
        pool.gate.set()
        for _ in range(20):
            for seed in (1, 2):
                got = await self.get(tier, seed)
                assert got in (Lost.ABSENT, self.bytes_of(arena, seed))
            await anyio.sleep(0.002)
        assert await self.put(tier, 1, 2) == [None, None]

    @pytest.mark.anyio
    async def test_a_cancelled_read_leaves_nothing(self, tier: Tier, pool: Pool) -> None:
        await self.put(tier, 1, 2)
        pool.gate.clear()
        pool.reached.clear()
        reads = [Read(key_of(1), ALL), Read(key_of(2), ALL)]
        async with anyio.create_task_group() as group:
            group.start_soon(tier.read, reads)
            await _patient(lambda: pool.reached.is_set() or reads[0].object is not None)
            group.cancel_scope.cancel()
        pool.gate.set()
        for read in reads:
            if read.object is not None:
                read.object.lease.release()
        assert isinstance(await self.get(tier, 1), bytes)

    @pytest.mark.anyio
    async def test_many_at_once(self, ctx: TierContext, tmp_path: Path, clock: Clock) -> None:
        """Puts, reads and drops of a few keys by many tasks: never a wrong byte."""
        right = {seed: self.bytes_of(ctx.arena, seed) for seed in range(12)}

        async def client(number: int) -> None:
            rng = random.Random(number)
            for _ in range(12):
                seed = rng.randrange(12)
                what = rng.random()
                if what < 0.5:
                    assert await self.get(tier, seed) in (Lost.ABSENT, right[seed])
                elif what < 0.9:
                    assert (await self.put(tier, seed))[0] in (None, Lost.NO_ROOM)
                else:
                    await tier.drop([key_of(seed)])

        async with self.opened(ctx, tmp_path, clock, capacity=6 * SIZE) as tier:
            async with anyio.create_task_group() as group:
                for number in range(6):
                    group.start_soon(client, number)
            assert tier.stat().nbytes <= 6 * SIZE

    @pytest.mark.anyio
    @settings(
        max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(
        kind=st.sampled_from(["flip", "cut", "zero"]),
        at=st.integers(0, SIZE - 1),
        bit=st.integers(0, 7),
    )
    async def test_damage_is_a_miss(self, tier: Tier, kind: str, at: int, bit: int) -> None:
        if self.damage is None:
            pytest.skip("cannot be damaged")

        def change(raw: bytearray) -> None:
            if kind == "flip":
                raw[at] ^= 1 << bit
            elif kind == "zero":
                raw[at:] = bytes(len(raw) - at)
            else:
                del raw[at:]

        await self.put(tier, 1)
        right = self.bytes_of(tier.ctx.arena, 1)
        self.damage(tier, key_of(1), change)
        try:
            # The padding of a header is under its checksum; a frame here fills its pages.
            assert await self.get(tier, 1) in (Lost.CORRUPT, Lost.ABSENT, right)
        except BadObject:
            await tier.drop([key_of(1)])  # what a reader does
        assert await self.get(tier, 1) in (Lost.ABSENT, right)
        await tier.clear()

    @pytest.mark.anyio
    async def test_swapped_objects_are_misses(self, tier: Tier) -> None:
        if self.damage is None:
            pytest.skip("cannot be damaged")
        await self.put(tier, 1, 2)
        seen: list[bytes] = []
        self.damage(tier, key_of(1), lambda raw: seen.append(bytes(raw)))
        self.damage(tier, key_of(2), lambda raw: seen.append(bytes(raw)))
        self.damage(tier, key_of(1), lambda raw: raw.__setitem__(slice(None), seen[1]))
        self.damage(tier, key_of(2), lambda raw: raw.__setitem__(slice(None), seen[0]))
        for seed in (1, 2):
            try:
                assert await self.get(tier, seed) is Lost.CORRUPT
            except BadObject:  # noqa: PERF203
                assert tier.in_arena  # whoever reads memory checks its header himself


async def _patient(ready: Callable[[], bool]) -> None:
    """Wait a moment for `ready`; tiers without threads never are."""
    for _ in range(50):
        if ready():
            return
        await anyio.sleep(0.002)


class CodecContract:
    """What every codec promises. A subclass says how to make its encoder and how far off it may be;
    `keys` opens what it encrypts."""

    lossless = False
    keys: Keyring | None = None
    per_element: float
    """Bits of an element of 128 x 2 x 64 that the encoded frame may take at most, bfloat16."""

    def encoder(self) -> Encode:
        raise NotImplementedError

    def check(self, x: Any, y: Any) -> None:
        """Assert that `y` float32 [kv, layers, tokens, heads, dim] is what becomes of `x`."""
        raise NotImplementedError

    def encode(self, x: Any, start: int = -1) -> tuple[EncodedFrame, FrameShape, Site]:
        """A tensor [kv, layers, tokens, heads, dim] as the stage would leave it."""
        header = header_of(x)
        data = x.contiguous().view(torch.uint8).numpy().tobytes()
        frame = EncodedFrame(data, len(data), b"")
        shape, site = FrameShape.of(header, 0, start), Site(header, 0, b"", self.keys)
        return self.encoder().frame(frame, shape, site), shape, site

    def decode(self, frame: EncodedFrame, shape: FrameShape, site: Site) -> Any:
        """The tensor again. Decoders never know where a frame starts."""
        out = decode_frame(frame.data, shape._replace(start=-1), frame.codecs, site)
        flat = torch.frombuffer(bytearray(out), dtype=getattr(torch, shape.dtype))
        return flat.view(shape.kv, shape.layers, shape.tokens, shape.heads, shape.dim)

    def there_and_back(self, x: Any, start: int = -1) -> tuple[EncodedFrame, Any]:
        frame, shape, site = self.encode(x, start)
        y = self.decode(frame, shape, site)
        if self.lossless or not frame.codecs:
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        else:
            self.check(x.float(), y.float())
        return frame, y

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("tokens", [1, 255, 256, 257])
    @pytest.mark.parametrize("start", [-1, 0, 256])
    def test_there_and_back(self, dtype: torch.dtype, tokens: int, start: int) -> None:
        x = noise(2, 2, tokens, 2, 64).to(dtype)
        frame, _ = self.there_and_back(x, start)
        assert frame.raw == x.numel() * x.itemsize
        if self.per_element and tokens > 1 and dtype == torch.bfloat16:
            assert 8 * len(frame.data) <= self.per_element * x.numel()

    @pytest.mark.parametrize(
        ("kv", "layers", "heads", "dim"), [(1, 3, 1, 512), (2, 1, 8, 128), (2, 4, 3, 64)]
    )
    def test_other_shapes(self, kv: int, layers: int, heads: int, dim: int) -> None:
        self.there_and_back(noise(kv, layers, 33, heads, dim).bfloat16(), 0)

    @pytest.mark.parametrize("name", ["uint8", "int8", "float8_e4m3fn", "float64"])
    def test_other_elements(self, name: str) -> None:
        x = noise(2, 1, 40, 2, 64).mul(50).to(getattr(torch, name))
        frame, y = self.there_and_back(x)
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("at", [0, 3000, -1])
    def test_what_is_not_finite_stays_as_it_is(
        self, bad: float, dtype: torch.dtype, at: int
    ) -> None:
        x = noise(2, 1, 40, 2, 64).to(dtype)
        x.view(-1)[at] = bad
        _, y = self.there_and_back(x, 256)
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_zeros_stay_zeros(self, dtype: torch.dtype) -> None:
        x = noise(2, 2, 40, 2, 64).to(dtype)
        x[:, :, 7:9] = x[0] = x[:, :, :, 1] = 0
        _, y = self.there_and_back(x)
        if dtype == torch.float32:
            assert not y[0].any()
        _, y = self.there_and_back(torch.zeros(2, 2, 40, 2, 64, dtype=dtype))
        assert not y.any()

    @pytest.mark.parametrize(
        ("dtype", "size"),
        [
            (torch.float16, 65504), (torch.bfloat16, 6e4), (torch.float32, 6e4),
            (torch.bfloat16, 1e30), (torch.bfloat16, 3.38e38), (torch.float32, 3.4e38),
            (torch.float16, 1e-5), (torch.bfloat16, 1e-20), (torch.float32, 1e-42),
        ],
        ids=str,
    )  # fmt: skip
    def test_huge_and_tiny(self, dtype: torch.dtype, size: float) -> None:
        x = (noise(2, 1, 40, 2, 64).clamp(-3, 3) / 3 * size).to(dtype)
        x[0, 0, 5] = size
        frame, y = self.there_and_back(x)
        assert torch.isfinite(y).all()
        if size < 7e4 and self.per_element:
            assert frame.codecs, "whatever float16 can hold is encoded"

    def test_lengths_that_cannot_be_right(self) -> None:
        frame, shape, site = self.encode(noise(2, 1, 40, 2, 64).bfloat16(), 0)
        data = bytes(frame.data)
        assert frame.codecs
        for other in (b"", data[:1], data[:-1], data[: len(data) // 2], data[1:]):
            self.refused(frame._replace(data=other), shape, site)
        for change in ({"tokens": 41}, {"tokens": 39}, {"layers": 2}, {"heads": 3}, {"tokens": 0}):
            self.refused(frame, shape._replace(**change), site)
        self.refused(frame._replace(codecs=frame.codecs + b"\xff"), shape, site)

    def refused(self, frame: EncodedFrame, shape: FrameShape, site: Site) -> None:
        with pytest.raises(BadObject):
            self.decode(frame, shape, site)

    @pytest.mark.slow
    def test_hostile_bytes(self) -> None:
        """100,000 mutated frames: a named error, or as many bytes as there should be."""
        refused = self.fuzz(100_000)
        assert 0 < refused < 100_000 or self.keys is not None

    def test_hostile_bytes_take_no_memory(self) -> None:
        frame, shape, site = self.encode(noise(2, 1, 256, 2, 64).bfloat16(), 0)
        self.decode(frame, shape, site)
        tracemalloc.start()
        for data in mutations(bytes(frame.data), 200):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with contextlib.suppress(BadObject):
                decode_frame(data, shape, frame.codecs, site)
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < 4 * shape.nbytes + (1 << 16)
        tracemalloc.stop()

    def fuzz(self, count: int) -> int:
        """Decode mutated frames; how many were refused."""
        refused = 0
        for seed, start in enumerate((0, 256)):
            frame, shape, site = self.encode(noise(2, 1, 8, 1, 64).bfloat16(), start)
            shape = shape._replace(start=-1)
            for data in mutations(bytes(frame.data), count // 2, seed):
                try:
                    out = decode_frame(data, shape, frame.codecs, site)
                except BadObject:  # noqa: PERF203
                    refused += 1
                else:
                    assert memoryview(out).nbytes == shape.nbytes
        return refused


_BOUNDED = """
import importlib, sys
sys.path[:0] = sys.argv[1:3]
for name in sys.argv[3:]:
    file, contract = name.split(":")
    getattr(importlib.import_module(file), contract)().fuzz(2000)
print("done")
"""


def fuzz_with_bounds_checks(cache: Path, *contracts: str) -> None:
    """Mutated frames for every `file:Class` in tests/stages, by kernels compiled with bounds
    checks, which are kept in the folder `cache`: nothing is touched outside of buffers."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", _BOUNDED, str(here / "stages"), str(here), *contracts],
        env={**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.stdout == "done\n", done.stderr


def noise(*shape: int) -> Any:
    """Numbers like those of a KV cache, always the same: channels that are off, a first token that
    is far out."""
    make = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=make)
    x[0] += 3 * torch.randn(shape[-1], generator=make)
    x[:, :, 0] *= 5
    return x


def header_of(x: Any) -> Header:
    """The header of an object of one frame that holds `x` [kv, layers, tokens, heads, dim]."""
    kv, layers, tokens, heads, dim = x.shape
    name = str(x.dtype).removeprefix("torch.")
    geometry = Geometry(kv=kv, layers=layers, heads=heads, dim=dim, dtype=name, block_tokens=1)
    raw = geometry.frame_bytes(layers, tokens)
    return Header(
        key=b"k" * 32, namespace=NAMESPACE, parent=b"p" * 32, token_digest=b"t" * 32,
        tokens=tokens, grain=GRAIN, group=layers, geometry=geometry,
        frames=plan_frames(4096, [raw], [raw]), links=b"k" * 32,
    )  # fmt: skip


def mutations(data: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Damaged copies of some bytes: flipped, overwritten, cut, lengthened, mostly at the start."""
    rng = random.Random(seed)
    for _ in range(count):
        made = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(rng.choice((min(16, len(made)), len(made))))
            made[at] = rng.choice((made[at] ^ 1 << rng.randrange(8), 0, 255, rng.randrange(256)))
        if rng.random() < 0.2:
            cut = rng.randrange(len(made))
            made = made[:cut] if rng.random() < 0.7 else made + rng.randbytes(rng.randrange(1, 40))
        yield bytes(made)
