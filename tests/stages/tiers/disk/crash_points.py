"""Ends a process at each write of a disk or files tier, and looks at what is there afterwards.

    python crash_points.py KIND FOLDER

A write is cut in half where it can be. Run by `test_crash_points.py`; prints how many there were.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import anyio

from tierloom.stages.errors import Lost
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.tier import TierContext
from tierloom.stages.tiers.disk import direct_io, index_log
from tierloom.stages.tiers.disk.tier import Disk, DiskOptions
from tierloom.stages.tiers.files.space import FilesOptions
from tierloom.stages.tiers.files.tier import Files
from tierloom.testing import NAMESPACE, SIZE, Pool, TierBench, key_of

KIND, FOLDER = sys.argv[1], Path(sys.argv[2])
SEEDS = range(9)
WRITES = ["pwritev", "write", "ftruncate", "replace", "rename", "unlink", "fdatasync", "fsync",
          "mkdir", "utime"]  # fmt: skip
bench = TierBench()


def make(arena: Arena) -> Disk | Files:
    ctx = TierContext(arena, NAMESPACE, Pool())
    if KIND == "files":
        return Files(FilesOptions(path=str(FOLDER), capacity=5 * SIZE), ctx)
    given = {"capacity": 4 * SIZE, "segment": 32 << 10, "keep_free": 0, "direct": False}
    return Disk(DiskOptions(path=str(FOLDER), **given), ctx)


async def work(tell) -> None:
    """Put, evict, delete, pin, snapshot, clear. Tells what is there after each step."""
    arena = Arena(64 * SIZE, huge_pages=False)
    tier = make(arena)

    async def there() -> None:
        found = await tier.exists([key_of(seed) for seed in SEEDS])
        tell([seed for seed, is_there in zip(SEEDS, found, strict=True) if is_there])

    await tier.open()
    await there()
    for seed in range(6):
        await bench.put(tier, seed)
        await there()
    await tier.delete([key_of(4)])
    await there()
    if KIND == "disk":
        tier.pin([key_of(5)])
        tier._store._snapshot()
        await there()
    await bench.put(tier, 4, 6)
    await there()
    await tier.clear()
    await there()
    await bench.put(tier, 7)
    await there()
    await tier.close()
    await there()


async def look(must: set[int]) -> None:
    """After the end: no wrong byte, and what was acknowledged and not taken away is there."""
    arena = Arena(64 * SIZE, huge_pages=False)
    tier = make(arena)
    await tier.open()
    for seed in SEEDS:
        got = await bench.get(tier, seed)
        assert got is not Lost.CORRUPT, seed
        if isinstance(got, bytes):
            assert got == bench.bytes_of(arena, seed), seed
        else:
            assert seed not in must, (seed, must)
    assert await bench.put(tier, 8) == [None]
    assert await bench.get(tier, 8) == bench.bytes_of(arena, 8)
    await tier.close()


def end_at(point: int) -> None:
    """The write with this number ends the process, half way through."""
    count = 0

    def wrapped(name, plain):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == point:
                if name == "write":
                    plain(args[0], args[1][: len(args[1]) // 2])
                elif name == "pwritev":
                    plain(args[0], [args[1][0][: len(args[1][0]) // 2]], args[2])
                os.kill(os.getpid(), signal.SIGTERM if point % 2 else signal.SIGKILL)
                signal.pause()
            return plain(*args, **kwargs)

        return call

    for name in WRITES:
        setattr(os, name, wrapped(name, getattr(os, name)))
    direct_io._fallocate = wrapped("fallocate", direct_io._fallocate)


def run(point: int) -> tuple[list[list[int]], bool]:
    """(what was told, whether it came to its end) of a process that ends at a write."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        tell, plain = write, os.write
        end_at(point)
        anyio.run(work, lambda found: plain(tell, json.dumps(found).encode() + b"\n"))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as lines:
        told = [json.loads(line) for line in lines]
    return told, os.waitpid(child, 0)[1] == 0


index_log._SMALL_LOG = 1000
whole, ended = run(0)
assert ended
assert not whole[-3]
points = 0
while not ended or not points:
    told, ended = run(points + 1)
    if ended:
        break
    points += 1
    before = set(told[-1]) if told else set()
    after = set(whole[min(len(told), len(whole) - 1)])
    anyio.run(look, before & after)
print(points)
