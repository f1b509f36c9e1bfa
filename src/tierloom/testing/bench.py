"""What tests of tiers work with: an arena that must be empty in the end, small objects that are
always the same, a clock and a pool that obey."""

from __future__ import annotations

import contextlib
import hashlib
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
import xxhash

from tierloom.stages.errors import BadObject, Lost
from tierloom.stages.kv.geometry import Geometry
from tierloom.stages.kv.object import Header, Object, plan_frames
from tierloom.stages.memory.arena import Arena, Lease
from tierloom.stages.memory.held import Call
from tierloom.stages.tiers.contract.tier import Read, Tier, TierContext
from tierloom.testing.arena import PoisonArena

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


def encrypted_anew(arena: Arena, seed: int) -> Object:
    """As `make_object`, in other bytes: what a codec makes that draws keys."""
    obj = make_object(arena, seed)
    checksums = []
    for f in obj.header.frames:
        stored = obj.lease.view[f.offset : f.offset + f.stored]
        stored[:] = bytes(byte ^ 0x5A for byte in stored)
        checksums.append(xxhash.xxh3_64_intdigest(stored))
    obj.seal(checksums)
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
    """Threads, whose calls can be held back at a gate; abandoned calls go on once they began."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.reached = threading.Event()

    async def __call__(
        self, fn: Callable[..., Any], *args: Any, leases: Iterable[Lease] = ()
    ) -> Any:
        call = Call(fn, args, leases)

        def run() -> Any:
            if not call.take():
                return None
            self.begun()
            return call.run()

        try:
            return await anyio.to_thread.run_sync(run, abandon_on_cancel=True)
        finally:
            call.drop()

    def begun(self) -> None:
        """A thread has taken a call."""
        self.reached.set()
        assert self.gate.wait(30)


class TierBench:
    """Fixtures and steps for tests of tiers: an arena that must be empty in the end, and into which
    nobody may write late; a pool."""

    def make(self, ctx: TierContext, folder: Path, clock: Clock, **options: Any) -> Tier:
        raise NotImplementedError

    @pytest.fixture(params=["asyncio", "trio"])
    def anyio_backend(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def arena(self) -> Iterator[Arena]:
        arena = PoisonArena(64 * SIZE, 64 * SIZE, huge_pages=False)
        yield arena
        for _ in range(200):  # abandoned threads release theirs
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

    async def first_frame(self, tier: Tier, seed: int) -> Object:
        """An object of which its header and first frame are read; the caller has its lease."""
        read = Read(key_of(seed), 1)
        await tier.read([read])
        assert read.object is not None
        return read.object

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
