"""An engine in a process of its own that writes, and a tier here in whose memory it does."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import xxhash
from peer_process import EngineProcess

from tierloom.stages.kv.object import Header, Object, header_size, plan_frames
from tierloom.stages.tiers.contract.tier import Read, TierContext
from tierloom.stages.tiers.landing.receiver import Receiver
from tierloom.stages.tiers.peers.options import PeerOptions
from tierloom.stages.tiers.peers.tier import Peer
from tierloom.stages.tiers.server import protocol as wire
from tierloom.testing import NAMESPACE, SIZE, Pool, key_of, links_of
from tierloom.testing.bench import GEOMETRY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tierloom.stages.memory.arena import Arena

TLS = {"shm": "all", "tcp": "tcp"}
"""UCX_TLS: by `all` bytes go from process to process, notes by TCP."""
TOKENS = 24_576
"""Of an object of 18 MiB: three frames of 6 MiB, which no write of 4 MiB ends with."""
ALL = 1 << 30
_FILES = itertools.count()


def environment(way: str) -> dict[str, str]:
    return {"UCX_TLS": TLS[way], "UCX_NET_DEVICES": "lo", "NIXL_LOG_LEVEL": "FATAL"}


def writer(folder: Path, way: str, room: int = 512 * SIZE, **serve: Any) -> EngineProcess:
    """It keeps what it is told to in memory, in the namespace of the contract's objects."""
    made: dict[str, Any] = {
        "version": 1, "budget": {"arena": max(room, 64 * SIZE)}, "graphs": {},
        "serve": {"tiers": ["hot"], "wire": "auto"} | serve,
        "tiers": {"hot": {"use": "memory", "capacity": room}},
    }  # fmt: skip
    return EngineProcess(folder, made, bare=True, env=environment(way))


def keep(other: EngineProcess, folder: Path, *objects: Object) -> list[int]:
    """Have it keep objects; a code for each."""
    file = folder / f"objects-{next(_FILES)}"
    file.write_bytes(b"".join(o.lease.view[: o.header.nbytes] for o in objects))
    codes: list[int] = other.tell(put=[str(file), [o.header.nbytes for o in objects]])
    file.unlink()
    return codes


def large_object(arena: Arena, seed: int) -> Object:
    """Sealed; the caller has its lease."""
    raw = [GEOMETRY.frame_bytes(2, TOKENS)] * 3
    links = links_of(seed, TOKENS)
    size = header_size(3, len(links) // 32)
    header = Header(
        key=links[-32:], namespace=NAMESPACE, parent=b"p" * 32, token_digest=b"t" * 32,
        tokens=TOKENS, grain=16, group=2, geometry=GEOMETRY, frames=plan_frames(size, raw, raw),
        links=links,
    )  # fmt: skip
    obj = Object(header, arena.lease(header.nbytes))
    view = obj.lease.view[: header.nbytes]
    view[:] = np.random.default_rng(seed).bytes(header.nbytes)
    frames = header.frames
    obj.seal([xxhash.xxh3_64_intdigest(view[f.offset : f.offset + f.stored]) for f in frames])
    return obj


def keep_large(other: EngineProcess, folder: Path, arena: Arena, *seeds: int) -> list[bytes]:
    """Have it keep objects of several writes; their bytes."""
    made = []
    for seed in seeds:
        obj = large_object(arena, seed)
        assert keep(other, folder, obj) == [0]
        made.append(bytes(obj.lease.view[: obj.header.nbytes]))
        obj.lease.release()
    return made


@contextlib.asynccontextmanager
async def reader(
    url: str, arena: Arena, pool: Pool, *, size: int, **options: Any
) -> AsyncIterator[Peer]:
    """A tier that is ready to have objects of `size` bytes written by the engine there."""
    options = {"timeout": 20, "hedge": None, "wire": "nixl", "landing": 64 << 20} | options
    tier = Peer(PeerOptions(directory=[url], **options), TierContext(arena, NAMESPACE, pool))
    await tier.open()
    try:
        await ready(tier, size)
        yield tier
    finally:
        await tier.close()


async def ready(tier: Peer, size: int) -> None:
    receiver, (holder,) = receiver_of(tier), tier.holders.values()
    await true(lambda: receiver.ready and bool(holder._client.welcome.flags & wire.LANDS))
    assert holder._landed is not None
    holder._landed.came(size)


def receiver_of(tier: Peer) -> Receiver:
    assert tier.receiver is not None
    return tier.receiver


async def settled(receiver: Receiver) -> None:
    """Nothing is in doubt, and nothing under way."""
    await true(lambda: not receiver._live and receiver.ready)


async def true(what: Callable[[], bool]) -> None:
    """Wait until it is."""
    with anyio.fail_after(30):
        while not what():  # noqa: ASYNC110
            await anyio.sleep(0.005)


async def bytes_of(tier: Peer, seed: int, tokens: int = TOKENS) -> bytes | object:
    """What comes; else why it does not."""
    read = Read(key_of(seed, tokens), ALL)
    try:
        await tier.read([read])
        if read.object is None:
            return read.lost
        return bytes(read.object.lease.view[: read.object.header.nbytes])
    finally:  # also where the call was given up when the object had come
        if read.object is not None:
            read.object.lease.release()
