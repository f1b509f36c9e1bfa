"""The clients that come with Mooncake and InfiniStore."""

from __future__ import annotations

import asyncio
import subprocess
from typing import TYPE_CHECKING, Any

import pools
from remote.clients import COUNT, PART, SLOT, Bare
from yardstick import cpu_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from remote.clients import Named

    from tierloom.stages.tiers.contract.tier import Tier


class Mooncake(Bare):
    """The tier's own client: the same pieces, out of and into the same arena."""

    def __init__(self, options: dict[str, Any], tier: Any, folder: Path) -> None:
        self.tier, self.targets = tier, tier.ctx.arena.lease(COUNT * SLOT)

    async def put(self, named: Sequence[Named]) -> None:
        names, addresses, sizes = self._pieces(named, [obj.lease.address for _, obj in named])
        put = self.tier._client.batch_put_from
        assert not any(await asyncio.to_thread(put, names, addresses, sizes))

    async def get(self, named: Sequence[Named]) -> None:
        into = [self.targets.address + n * SLOT for n in range(len(named))]
        names, addresses, sizes = self._pieces(named, into)
        get = self.tier._client.batch_get_into
        assert await asyncio.to_thread(get, names, addresses, sizes) == sizes

    async def drop(self, named: Sequence[Named]) -> None:
        names = self._pieces(named, [0] * len(named))[0]
        await asyncio.to_thread(self.tier._client.batch_remove, names, True)

    def close(self) -> None:
        self.targets.release()

    def _pieces(
        self, named: Sequence[Named], where: list[int]
    ) -> tuple[list[str], list[int], list[int]]:
        names, addresses, sizes = [], [], []
        for (name, obj), address in zip(named, where, strict=True):
            for at in range(0, obj.header.nbytes, PART):
                names.append(f"bare/{name}/{at}")
                addresses.append(address + at)
                sizes.append(min(PART, obj.header.nbytes - at))
        return names, addresses, sizes


LIBRARY = """
import signal, sys, infinistore as inf, numpy as np
config = inf.ClientConfig(host_addr="127.0.0.1", service_port=int(sys.argv[1]),
                          connection_type=inf.TYPE_TCP, log_level="error")
c = inf.InfinityConnection(config); c.connect()
a = np.random.default_rng(0).integers(0, 255, 33 << 20, dtype=np.uint8)
piece = 1 << 20
print("ready", flush=True)
for line in sys.stdin:
    signal.alarm(60)
    what, *words = line.split()
    for name, nbytes in zip(words[::2], map(int, words[1::2])):
        starts = range(0, nbytes, piece)
        if what == "drop": c.delete_keys([f"bare/{name}/{at}" for at in starts])
        for at in starts:
            key, size = f"bare/{name}/{at}", min(piece, nbytes - at)
            if what == "put": c.tcp_write_cache(key, a.ctypes.data + at, size)
            if what == "get": got = c.tcp_read_cache(key); assert got.nbytes == size
    print("done", flush=True)
"""
"""The library that comes with InfiniStore, in the server's environment: pieces of 1 MiB. No key is
written twice: it would be evicted with its first value, and the library waits for ever for it."""


class Infinistore(Bare):
    """A process of its own, which does as it is told line by line."""

    def __init__(self, options: dict[str, Any], tier: Tier, folder: Path) -> None:
        python = str(pools.install_pooled.INFINISTORE / "bin" / "python")
        port = options["url"].rpartition(":")[2]
        self.child = subprocess.Popen(
            [python, "-c", LIBRARY, port], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._hear("ready")

    def cpu(self) -> float:
        return cpu_of(self.child.pid)

    async def put(self, named: Sequence[Named]) -> None:
        await asyncio.to_thread(self._tell, "put", named)

    async def get(self, named: Sequence[Named]) -> None:
        await asyncio.to_thread(self._tell, "get", named)

    async def drop(self, named: Sequence[Named]) -> None:
        await asyncio.to_thread(self._tell, "drop", named)

    def close(self) -> None:
        self.child.kill()
        self.child.communicate()

    def _tell(self, what: str, named: Sequence[Named]) -> None:
        assert self.child.stdin is not None
        words = [f"{name} {obj.header.nbytes}" for name, obj in named]
        self.child.stdin.write(" ".join([what, *words]) + "\n")
        self.child.stdin.flush()
        self._hear("done")

    def _hear(self, word: str) -> None:
        """The library says things of its own, too."""
        assert self.child.stdout is not None
        heard = any(line.strip() == word for line in self.child.stdout)
        assert heard, "InfiniStore's library has ended"
