"""Tiers behind a client library beside the library alone: CPU seconds per GB, objects of 32 MiB.

    python benchmarks/remote_tiers.py [s3] [nixl-posix] [nixl-obj]     (make bench-remote)

A round stores objects by the bare client and then by the tier, and reads them back by both, so that
all four see the same noise. The bare client does what the tier must at least: the same requests, as
many at once, into memory that nobody looks at. The tier does the rest, too: names, sizes, headers,
and every byte in the lease it is served from, where it is compared with what was stored. Buckets
are a server on this machine, whose CPU is not counted; it has no part in the ratio.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import mmap
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "tiers"))
sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != ROOT]
from buckets import KEY, NAME, SECRET, localbucket  # noqa: E402

from tierloom.pipeline.pool import Pool  # noqa: E402
from tierloom.stages.arena import Arena  # noqa: E402
from tierloom.stages.geometry import Geometry  # noqa: E402
from tierloom.stages.object import Header, Object, plan_frames  # noqa: E402
from tierloom.stages.tiers.base import Read, Tier, TierContext  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

ROUNDS, COUNT, AT_ONCE, PART = 9, 8, 4, 4 << 20
BAR = 1.3
GEOMETRY = Geometry(kv=2, layers=32, heads=8, dim=128, dtype="bfloat16", block_tokens=1)
SPACE = b"b" * 32


class Bare:
    """The client alone: `put` and `get` of one object by a name."""

    async def put(self, name: str, obj: Object) -> None:
        raise NotImplementedError

    async def get(self, name: str, obj: Object) -> None:
        raise NotImplementedError


class Obstore(Bare):
    def __init__(self, url: str) -> None:
        import obstore
        from obstore.store import S3Store

        self.obs = obstore
        self.store = S3Store(
            NAME, prefix="bare", endpoint=url, region="us-east-1", unsigned_payload=True,
            client_options={"allow_http": True},
        )  # fmt: skip

    async def put(self, name: str, obj: Object) -> None:
        body = obj.lease.view[: obj.header.nbytes]
        await self.obs.put_async(self.store, name, body, mode="create", use_multipart=False)

    async def get(self, name: str, obj: Object) -> None:
        nbytes = obj.header.nbytes

        async def one(start: int) -> None:
            await self.obs.get_range_async(
                self.store, name, start=start, end=min(nbytes, start + PART)
            )

        await few(one, list(range(0, nbytes, PART)))


class Nixl(Bare):
    """One transfer per object, polled by its thread; files are direct and preallocated."""

    def __init__(self, backend: str, params: dict[str, str], folder: Path, url: str) -> None:
        os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
        from nixl_cu12 import _api

        self.folder, self.files = folder, backend != "OBJ"
        config = _api.nixl_agent_config(
            backends=[], sync_mode=_api.nixl_thread_sync_t.NIXL_THREAD_SYNC_RW
        )
        self.agent = _api.nixl_agent("bare", config)
        self.agent.create_backend(backend, params)
        self.obstore = Obstore(url) if url else None
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1, AT_ONCE * (34 << 20), private)
        memory.madvise(mmap.MADV_HUGEPAGE)
        self.scratch = np.frombuffer(memory, np.uint8).reshape(AT_ONCE, -1)
        self.scratch[:] = 1
        self.threads = ThreadPoolExecutor(AT_ONCE)
        self.free = list(range(AT_ONCE))
        self.agent.register_memory([(self.scratch.ctypes.data, self.scratch.nbytes, 0, "")], "DRAM")
        self.numbers = iter(range(1 << 30))

    async def put(self, name: str, obj: Object) -> None:
        if self.obstore is not None:
            return await self.obstore.put(name, obj)
        loop = asyncio.get_running_loop()
        slot = self.free.pop()
        await loop.run_in_executor(self.threads, self._file, "WRITE", name, obj.header.nbytes, slot)
        self.free.append(slot)
        return None

    async def get(self, name: str, obj: Object) -> None:
        loop = asyncio.get_running_loop()
        slot = self.free.pop()
        move = self._file if self.files else self._object
        await loop.run_in_executor(self.threads, move, "READ", name, obj.header.nbytes, slot)
        self.free.append(slot)

    def _file(self, verb: str, name: str, nbytes: int, slot: int) -> None:
        path = self.folder / name
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        if verb == "WRITE":
            os.posix_fallocate(fd, 0, nbytes)
        known = self.agent.register_memory([(0, nbytes, fd, "")], "FILE")
        self._go(verb, slot, nbytes, "FILE", fd)
        self.agent.deregister_memory(known)
        os.close(fd)

    def _object(self, verb: str, name: str, nbytes: int, slot: int) -> None:
        number = next(self.numbers)
        known = self.agent.register_memory([(0, nbytes, number, f"bare/{name}")], "OBJ")
        self._go(verb, slot, nbytes, "OBJ", number)
        self.agent.deregister_memory(known)

    def _go(self, verb: str, slot: int, nbytes: int, kind: str, number: int) -> None:
        address, agent = self.scratch[slot].ctypes.data, self.agent
        handle = agent.initialize_xfer(
            verb, agent.get_xfer_descs([(address, nbytes, 0)], "DRAM"),
            agent.get_xfer_descs([(0, nbytes, number)], kind), agent.name,
        )  # fmt: skip
        state = agent.transfer(handle)
        while state == "PROC":
            time.sleep(0.0003)
            state = agent.check_xfer_state(handle)
        assert state == "DONE", state
        agent.release_xfer_handle(handle)


async def few(work: Callable[[Any], Awaitable[None]], items: list[Any]) -> None:
    """All of it, AT_ONCE at a time."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(item: Any) -> None:
        async with gate:
            await work(item)

    await asyncio.gather(*map(one, items))


def objects(arena: Arena) -> list[Object]:
    """Sealed objects of 256 tokens of Llama-3.1-8B."""
    made = []
    rng = np.random.default_rng(0)
    for n in range(COUNT):
        raw = [GEOMETRY.frame_bytes(4, 256)] * 8
        key = n.to_bytes(32, "little")
        header = Header(
            key=key, namespace=SPACE, parent=b"p" * 32, token_digest=b"t" * 32, tokens=256,
            grain=256, group=4, geometry=GEOMETRY, frames=plan_frames(4096, raw, raw), links=key,
        )  # fmt: skip
        obj = Object(header, arena.lease(header.nbytes))
        ctypes.memset(obj.lease.address, 0, header.nbytes)
        view = np.frombuffer(obj.lease.view, np.uint64)
        view[:] = rng.integers(0, 1 << 63, len(view), dtype=np.uint64)
        frames = [obj.lease.view[f.offset : f.offset + f.stored] for f in header.frames]
        obj.seal([xxhash.xxh3_64_intdigest(frame) for frame in frames])
        made.append(obj)
    return made


async def run(tier: Tier, bare: Bare, arena: Arena) -> dict[str, float]:
    """Medians of CPU seconds per GB."""
    await tier.open()
    kept = objects(arena)
    size = sum(obj.header.nbytes for obj in kept)
    took: dict[str, list[float]] = {}

    async def timed(what: str, work: Callable[[], Awaitable[Any]]) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        result = await work()
        took.setdefault(f"{what} CPU s/GB", []).append((time.process_time() - cpu) / size * 1e9)
        took.setdefault(f"{what} GB/s", []).append(size / (time.perf_counter() - wall) / 1e9)
        return result

    for turn in range(ROUNDS + 1):
        named = [(f"{turn}-{n}", obj) for n, obj in enumerate(kept)]
        await timed("store bare", lambda named=named: few(lambda each: bare.put(*each), named))
        assert await timed("store", lambda: tier.put(kept)) == [None] * COUNT
        await timed("retrieve bare", lambda named=named: few(lambda each: bare.get(*each), named))
        reads = [Read(obj.header.key, 1 << 30) for obj in kept]
        await timed("retrieve", lambda reads=reads: tier.read(reads))
        for read, obj in zip(reads, kept, strict=True):
            assert read.object is not None, read.lost
            assert np.array_equal(
                np.frombuffer(read.object.lease.view, np.uint64),
                np.frombuffer(obj.lease.view, np.uint64),
            )
            read.object.lease.release()
        assert await tier.drop([obj.header.key for obj in kept]) == COUNT
        if not turn:
            took.clear()  # the first touch of memory and files
    await tier.close()
    for obj in kept:
        obj.lease.release()
    made = {name: round(statistics.median(values), 3) for name, values in took.items()}
    for what in ("store", "retrieve"):
        ratios = [
            a / b
            for a, b in zip(took[f"{what} CPU s/GB"], took[f"{what} bare CPU s/GB"], strict=True)
        ]
        made[f"{what} x bare"] = round(statistics.median(ratios), 2)
    return made


@contextmanager
def case(name: str, folder: Path, ctx: TierContext) -> Iterator[tuple[Tier, Bare]]:
    """A tier, and its client."""
    from tierloom.stages.tiers.nixl import Nixl as NixlTier
    from tierloom.stages.tiers.nixl import NixlOptions
    from tierloom.stages.tiers.s3 import S3, S3Options

    with ExitStack() as stack:
        if name == "nixl-posix":
            (folder / "bare").mkdir()
            options = NixlOptions(path=str(folder / "tier"), direct=True)
            bare: Bare = Nixl("POSIX", {"use_aio": "true"}, folder / "bare", "")
            yield NixlTier(options, ctx), bare
            return
        os.environ |= {
            "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_EC2_METADATA_DISABLED": "true", "AWS_REGION": "us-east-1",
        }  # fmt: skip
        url = stack.enter_context(localbucket(folder)).url
        if name == "s3":
            s3 = S3Options(url=f"s3://{NAME}/tier", endpoint=url, unsigned=True)
            yield S3(s3, ctx), Obstore(url)
        else:
            params = {
                "bucket": NAME, "endpoint_override": url, "scheme": "http", "region": "us-east-1",
                "use_virtual_addressing": "false", "num_threads": "4", "req_checksum": "required",
            }  # fmt: skip
            options = NixlOptions(
                backend="OBJ", url=f"s3://{NAME}/tier", endpoint=url, unsigned=True
            )
            yield NixlTier(options, ctx), Nixl("OBJ", params, folder, url)


def main() -> None:
    results: dict[str, Any] = {}
    for name in sys.argv[1:] or ["s3", "nixl-posix", "nixl-obj"]:
        arena = Arena((2 * COUNT + 1) * (33 << 20))
        pool = Pool(4, "io")
        with (
            tempfile.TemporaryDirectory(prefix=".bench-", dir=ROOT / "benchmarks") as folder,
            case(name, Path(folder), TierContext(arena, SPACE, pool)) as (tier, bare),
        ):
            results[name] = asyncio.run(run(tier, bare, arena))
        pool.close()
        for what in ("store", "retrieve"):
            r = results[name]
            print(
                f"{name:11} {what:9} {r[f'{what} CPU s/GB']:.3f} CPU s/GB, client alone "
                f"{r[f'{what} bare CPU s/GB']:.3f}: x {r[f'{what} x bare']:.2f} (bar {BAR}); "
                f"{r[f'{what} GB/s']:.2f} and {r[f'{what} bare GB/s']:.2f} GB/s",
                flush=True,
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
