"""The tier `peer` by `wire: nixl`, beside writes by bare NIXL of as many bytes; in turns. Neither
has NIXL's own thread: both look after their agents, with naps of 200 us."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from peer_process import engine
from remote.bare import SPACE, objects
from remote.clients import COUNT, SLOT
from remote.nixl_sender import NAP, NBYTES, OBJECT, PIECE, bytes_in
from yardstick import GB, cpu_of

from tierloom.pipeline.run.threads import Pool
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.tier import Read, TierContext
from tierloom.stages.tiers.landing.region import LandingRegion
from tierloom.stages.tiers.nixl.agent import Agent
from tierloom.stages.tiers.peers.options import PeerOptions
from tierloom.stages.tiers.peers.tier import Peer
from tierloom.triton_kernels.checksum.xxh3_cpu import xxh3_64

HELD: dict[str, Any] = {
    "version": 1, "budget": {"arena": 9 * SLOT}, "graphs": {},
    "serve": {"tiers": ["hot"], "wire": "nixl"},
    "tiers": {"hot": {"use": "memory", "capacity": 9 * SLOT}},
}  # fmt: skip
UCX_TLS = {"shm": "all", "tcp": "tcp"}


class BareNixl:
    """A process that writes, and memory here that it writes into."""

    def __init__(self, env: dict[str, str]) -> None:
        self.region = LandingRegion(NBYTES)
        bytes_in(self.region)[:] = bytes(NBYTES)
        self.agent = Agent("UCX", {}, self.region, shared=False, polled=True)
        self.child = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("nixl_sender.py"))], text=True, env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._hear()
        card = {"address": self.region.address, "metadata": self.agent.metadata.hex()}
        self._say(json.dumps(card))

    def round(self) -> tuple[float, float]:
        """Seconds of the writes, and of the reads in which their checksums are taken."""
        begun = time.perf_counter()
        self._say("go")
        came = 0
        while came < NBYTES // PIECE:
            heard = len(self.agent.notes())
            came += heard
            if not heard:
                time.sleep(NAP)
        wrote = time.perf_counter() - begun
        self._hear()
        begun = time.perf_counter()
        for at in range(0, NBYTES, OBJECT):
            xxh3_64(self.region.address + at, OBJECT)
        return wrote, time.perf_counter() - begun

    def close(self) -> None:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.close()
        self.child.wait(20)
        self.child.stdout.close()
        self.agent.destroy()
        self.region.close()

    def _say(self, word: str) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(word + "\n")
        self.child.stdin.flush()

    def _hear(self) -> None:
        assert self.child.stdout is not None
        assert self.child.stdout.readline()


async def written(folder: Path, way: str, rounds: int, idle: float) -> dict[str, Any]:
    """`way`: shm or tcp."""
    os.environ |= {"UCX_TLS": UCX_TLS[way], "UCX_NET_DEVICES": "lo"}  # read by each agent anew
    arena, pool = Arena((2 * COUNT + 1) * SLOT), Pool(2, "io")
    kept = objects(arena)
    file, sizes = folder / f"objects-{way}", [o.header.nbytes for o in kept]
    file.write_bytes(b"".join(o.lease.view[: o.header.nbytes] for o in kept))
    size = sum(sizes)
    with engine(folder / way, HELD, bare=True, space=SPACE.hex(), env=dict(os.environ)) as other:
        assert other.tell(put=[str(file), sizes]) == [0] * COUNT
        bare = BareNixl(dict(os.environ))
        options = PeerOptions(
            directory=[other.url], timeout=60, hedge=None, connections=8, wire="nixl"
        )
        tier = Peer(options, TierContext(arena, SPACE, pool))
        await tier.open()
        receiver = tier.receiver
        assert receiver is not None
        for _ in range(2):
            await retrieved(tier, kept)
            while not receiver.ready:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        cpu: dict[str, list[float]] = {"bare": [], "peer": []}
        rate: dict[str, list[float]] = {"bare": [], "bare, verified": [], "peer, verified": []}
        for _ in range(rounds + 1):
            before = cpu_of(bare.child.pid) + time.process_time()
            wrote, verified = bare.round()
            await asyncio.sleep(0.05)
            cpu["bare"].append((cpu_of(bare.child.pid) + time.process_time() - before) / NBYTES)
            rate["bare"].append(NBYTES / GB / wrote)
            rate["bare, verified"].append(NBYTES / GB / (wrote + verified))
            landed, begun = receiver.landed, time.perf_counter()
            before = cpu_of(other.pid) + time.process_time()
            await retrieved(tier, kept)
            rate["peer, verified"].append(size / GB / (time.perf_counter() - begun))
            await asyncio.sleep(0.05)
            cpu["peer"].append((cpu_of(other.pid) + time.process_time() - before) / size)
            assert receiver.landed == landed + COUNT
        bare.close()
        await asyncio.gather(*(tier.exists([obj.header.key]) for obj in kept))
        await asyncio.sleep(0.5)
        mine, theirs = time.process_time(), cpu_of(other.pid)
        await asyncio.sleep(idle)
        resting = (time.process_time() - mine) / idle, (cpu_of(other.pid) - theirs) / idle
        (holder,) = tier.holders.values()
        assert holder._client._pool is not None
        connections = len(holder._client._pool._idle)
        await tier.close()
    pool.close()
    return {
        "cpu_s_per_gb": {k: statistics.median(v[1:]) * GB for k, v in cpu.items()},
        "cpu_ratio": middle([p / b for p, b in zip(cpu["peer"][1:], cpu["bare"][1:], strict=True)]),
        "gb_per_s": {k: middle(v[1:]) for k, v in rate.items()},
        "rate_ratio": middle(
            [p / b for p, b in zip(rate["peer, verified"][1:], rate["bare"][1:], strict=True)]
        ),
        "idle_cpu_s_per_s": {"reader": resting[0], "holder": resting[1]},
        "connections": connections,
    }  # fmt: skip


def middle(values: list[float]) -> dict[str, float]:
    quarters = statistics.quantiles(values, n=4)
    return dict(zip(("quarter", "median", "three quarters"), quarters, strict=True))


async def retrieved(tier: Peer, kept: list[Any]) -> None:
    """One object after another; each is verified when it has come."""
    for obj in kept:
        read = Read(obj.header.key, 1 << 30)
        await tier.read([read])
        assert read.object is not None, read.lost
        assert read.object.sealed
        read.object.lease.release()
