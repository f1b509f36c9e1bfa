"""NIXL's agent alone, with files and with objects of a bucket."""

from __future__ import annotations

import asyncio
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import buckets
import numpy as np
from remote.clients import AT_ONCE, SLOT, Bare, Obstore, few

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from remote.clients import Named

    from tierloom.stages.tiers.contract.tier import Tier


class Nixl(Bare):
    """One transfer per object, polled by its thread; files are direct and preallocated."""

    def __init__(self, options: dict[str, Any], tier: Tier, folder: Path) -> None:
        os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
        from nixl_cu12 import _api

        self.folder = folder
        config = _api.nixl_agent_config(
            backends=[], sync_mode=_api.nixl_thread_sync_t.NIXL_THREAD_SYNC_RW
        )
        self.agent = _api.nixl_agent("bare", config)
        self.agent.create_backend(*self._backend(options))
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1, AT_ONCE * SLOT, private)
        memory.madvise(mmap.MADV_HUGEPAGE)
        self.scratch = np.frombuffer(memory, np.uint8).reshape(AT_ONCE, -1)
        self.scratch[:] = 1
        self.threads = ThreadPoolExecutor(AT_ONCE)
        self.free = list(range(AT_ONCE))
        self.agent.register_memory([(self.scratch.ctypes.data, self.scratch.nbytes, 0, "")], "DRAM")

    async def put(self, named: Sequence[Named]) -> None:
        await self._all("WRITE", named)

    async def get(self, named: Sequence[Named]) -> None:
        await self._all("READ", named)

    async def drop(self, named: Sequence[Named]) -> None:
        for name, _ in named:
            (self.folder / name).unlink()

    def close(self) -> None:
        self.threads.shutdown()

    def _backend(self, options: dict[str, Any]) -> tuple[str, dict[str, str]]:
        return "POSIX", {"use_aio": "true"}

    async def _all(self, verb: str, named: Sequence[Named]) -> None:
        loop = asyncio.get_running_loop()

        async def one(each: Named) -> None:
            slot = self.free.pop()
            nbytes = each[1].header.nbytes
            await loop.run_in_executor(self.threads, self._move, verb, each[0], nbytes, slot)
            self.free.append(slot)

        await few(one, named)

    def _move(self, verb: str, name: str, nbytes: int, slot: int) -> None:
        fd = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        if verb == "WRITE":
            os.posix_fallocate(fd, 0, nbytes)
        known = self.agent.register_memory([(0, nbytes, fd, "")], "FILE")
        self._go(verb, slot, nbytes, "FILE", fd)
        self.agent.deregister_memory(known)
        os.close(fd)

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


class NixlObjects(Nixl):
    """NIXL reads; obstore puts and deletes, as it does for the tier."""

    def __init__(self, options: dict[str, Any], tier: Tier, folder: Path) -> None:
        super().__init__(options, tier, folder)
        self.obstore = Obstore(options, tier, folder)
        self.numbers = iter(range(1 << 30))

    async def put(self, named: Sequence[Named]) -> None:
        await self.obstore.put(named)

    async def drop(self, named: Sequence[Named]) -> None:
        await self.obstore.drop(named)

    def _backend(self, options: dict[str, Any]) -> tuple[str, dict[str, str]]:
        return "OBJ", {
            "bucket": buckets.NAME, "endpoint_override": options["endpoint"], "scheme": "http",
            "region": "us-east-1", "use_virtual_addressing": "false", "num_threads": "4",
            "req_checksum": "required",
        }  # fmt: skip

    def _move(self, verb: str, name: str, nbytes: int, slot: int) -> None:
        number = next(self.numbers)
        known = self.agent.register_memory([(0, nbytes, number, f"bare/{name}")], "OBJ")
        self._go(verb, slot, nbytes, "OBJ", number)
        self.agent.deregister_memory(known)
