"""Memory that a server lends: it stays as it is until it is given back, whoever dies meanwhile."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from store_server import Within, process

from tierloom.stages.errors import BadObject, Lost
from tierloom.stages.kv.object import name_of
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.tier import Read, TierContext
from tierloom.stages.tiers.server.shared_memory import SharedMemory
from tierloom.stages.tiers.server.tier import Server, ServerOptions
from tierloom.testing import ALL, NAMESPACE, SIZE, TierBench, key_of, verify

from .test_server_hostile import eventually, fill

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

CAPACITY = 16 * SIZE
ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture
def within(tmp_path: Path) -> Iterator[Within]:
    """A server that may lend a quarter of its memory to each client: 4 objects."""
    tiers = {"hot": {"use": "memory", "capacity": CAPACITY}}
    made = Within(tmp_path / "socket", tiers=tiers)
    yield made
    eventually(lambda: not made.serving.listener.sessions)
    assert made.serving.listener.lending.nbytes == 0
    assert made.serving.store.arena.flight == 0
    made.stop()


class TestLoans(TierBench):
    @pytest.fixture
    def url(self, within: Within) -> str:
        return within.urls[1]

    @pytest.fixture
    async def tier(self, ctx: TierContext, url: str, anyio_backend: str) -> AsyncIterator[Server]:
        tier = Server(ServerOptions(url=url), ctx)
        await tier.open()
        yield tier
        await tier.close()

    async def held(self, tier: Any, *seeds: int) -> list[Any]:
        reads = [Read(key_of(seed), ALL) for seed in seeds]
        await tier.read(reads)
        assert [read.lost for read in reads] == [None] * len(reads)
        return [read.object for read in reads]

    @pytest.mark.anyio
    async def test_a_read_is_a_lease_of_the_servers_memory(
        self, tier: Server, arena: Arena, within: Within
    ) -> None:
        await self.put(tier, 1)
        (obj,) = await self.held(tier, 1)
        assert arena.leases == 0
        assert isinstance(obj.lease.arena, SharedMemory)
        assert obj.lease.view.readonly
        assert verify(obj, key_of(1)) == self.bytes_of(arena, 1)
        assert within.serving.listener.lending.nbytes == SIZE
        kept = obj.lease.retain()
        obj.lease.release()
        assert verify(obj, key_of(1)) == self.bytes_of(arena, 1)
        kept.release()
        eventually(lambda: within.serving.listener.lending.nbytes == 0)
        with pytest.raises(RuntimeError, match="twice"):
            kept.release()

    @pytest.mark.anyio
    async def test_a_device_gets_what_lies_in_its_own_memory(
        self, ctx: TierContext, url: str, arena: Arena, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Kernels read the page-locked arena directly; another's memory they could not."""
        with monkeypatch.context() as patch:
            patch.setattr(arena, "_pinned", True)
            tier = Server(ServerOptions(url=url), ctx)
        await tier.open()
        await self.put(tier, 1)
        (obj,) = await self.held(tier, 1)
        assert obj.lease.arena is arena
        assert verify(obj, key_of(1)) == self.bytes_of(arena, 1)
        obj.lease.release()
        await tier.close()

    @pytest.mark.anyio
    async def test_what_is_lent_is_not_overwritten(self, tier: Server, arena: Arena) -> None:
        """The tier is filled many times over, and the object dropped: the bytes stay."""
        right = self.bytes_of(arena, 1)
        await self.put(tier, 1)
        (obj,) = await self.held(tier, 1)
        await tier.delete([key_of(1)])
        for seed in range(10, 60):
            await self.put(tier, seed)
            assert bytes(obj.lease.view[:SIZE]) == right
        obj.lease.release()

    @pytest.mark.anyio
    async def test_no_more_is_lent_than_a_share(self, tier: Server, arena: Arena) -> None:
        """Beyond it, objects come as bytes; so one client cannot pin everything."""
        await self.put(tier, *range(8))
        objects = await self.held(tier, *range(8))
        lent = [isinstance(obj.lease.arena, SharedMemory) for obj in objects]
        assert lent == [True] * 4 + [False] * 4
        for seed, obj in enumerate(objects):
            assert verify(obj, key_of(seed)) == self.bytes_of(arena, seed)
            obj.lease.release()
        objects = await self.held(tier, 7)
        assert isinstance(objects[0].lease.arena, SharedMemory), "what was given back is lent again"
        objects[0].lease.release()

    @pytest.mark.anyio
    async def test_all_clients_together_get_half(self, ctx: TierContext, url: str) -> None:
        tiers = [Server(ServerOptions(url=url), ctx) for _ in range(3)]
        for tier in tiers:
            await tier.open()
        await self.put(tiers[0], *range(4))
        objects = [await self.held(tier, *range(4)) for tier in tiers]
        lent = [sum(isinstance(o.lease.arena, SharedMemory) for o in each) for each in objects]
        assert lent == [4, 4, 0]
        for each in objects:
            for obj in each:
                obj.lease.release()
        for tier in tiers:
            await tier.close()

    @pytest.mark.anyio
    async def test_a_closed_tier_waits_for_its_last_loan(
        self, ctx: TierContext, url: str, within: Within, arena: Arena
    ) -> None:
        tier = Server(ServerOptions(url=url), ctx)
        await tier.open()
        await self.put(tier, 1)
        right = self.bytes_of(arena, 1)
        (obj,) = await self.held(tier, 1)
        await tier.close()
        assert within.serving.listener.lending.nbytes == SIZE
        assert bytes(obj.lease.view[:SIZE]) == right
        obj.lease.release()
        eventually(lambda: within.serving.listener.lending.nbytes == 0)

    @pytest.mark.anyio
    async def test_who_is_sent_away_keeps_what_was_lent(
        self, tier: Server, within: Within, arena: Arena
    ) -> None:
        """The server ends the session of a client that still reads: its memory is left alone."""
        right = self.bytes_of(arena, 1)
        await self.put(tier, 1)
        (obj,) = await self.held(tier, 1)
        shared_memory = obj.lease.arena
        shared_memory._connection.sock.send(b"nonsense" * 4)
        eventually(lambda: any(session.gone for session in within.serving.listener.sessions))
        for seed in range(10, 40):
            await self.put(tier, seed)
            assert bytes(obj.lease.view[:SIZE]) == right
        assert within.serving.listener.lending.nbytes == SIZE
        (other,) = await self.held(tier, 39)
        assert other.lease.arena is not shared_memory, "a new connection, with a mapping of its own"
        obj.lease.release()
        assert shared_memory._connection.sock.fileno() < 0
        assert bytes(other.lease.view[:SIZE]) == self.bytes_of(arena, 39)
        other.lease.release()

    @pytest.mark.anyio
    async def test_a_cancelled_loan_goes_back(self, tier: Server, within: Within) -> None:
        await self.put(tier, 1)
        for _ in range(30):
            reads = [Read(key_of(1), ALL)]
            async with anyio.create_task_group() as group:
                group.start_soon(tier.read, reads)
                await anyio.lowlevel.checkpoint()
                group.cancel_scope.cancel()
            if reads[0].object is not None:
                reads[0].object.lease.release()
        eventually(lambda: within.serving.listener.lending.nbytes == 0)
        (obj,) = await self.held(tier, 1)
        obj.lease.release()

    @pytest.mark.anyio
    @pytest.mark.parametrize("at", range(0, SIZE, SIZE // 13))
    async def test_damage_in_the_servers_memory_is_a_miss(
        self, tier: Server, within: Within, arena: Arena, at: int
    ) -> None:
        """Over shared memory and over the socket alike."""
        right = self.bytes_of(arena, 1)
        for share in (True, False):
            tier._client.shares = share
            await self.put(tier, 1)
            entry = within.serving.store.tiers[0].tier._index.get(name_of(NAMESPACE, key_of(1)))
            entry.place.lease.view[at] ^= 4
            try:
                got = await self.get(tier, 1)
            except BadObject:  # what scatter does with a frame
                await tier.delete([key_of(1)])
            else:
                assert got is Lost.CORRUPT or got == right
            assert await self.get(tier, 1) in (Lost.ABSENT, right)

    @pytest.mark.anyio
    async def test_what_comes_from_the_servers_disk_is_lent_too(
        self, ctx: TierContext, arena: Arena, tmp_path: Path
    ) -> None:
        tiers = {
            "hot": {"use": "memory", "capacity": 8 * SIZE},
            "cold": {"use": "files", "path": str(tmp_path / "kv")},
        }
        with process(tmp_path, tiers=tiers, listen=(f"unix://{tmp_path}/disk",)) as server:
            tier = Server(ServerOptions(url=server.url), ctx)
            await tier.open()
            for seed in range(12):
                await self.put(tier, seed)
                await anyio.sleep(0.02)
            for seed in range(12):
                reads = [Read(key_of(seed), ALL)]
                await tier.read(reads)
                if reads[0].object is None:  # the disk was too slow to take it
                    assert reads[0].lost is Lost.ABSENT
                    continue
                assert isinstance(reads[0].object.lease.arena, SharedMemory)
                assert verify(reads[0].object, key_of(seed)) == self.bytes_of(arena, seed)
                reads[0].object.lease.release()
            assert tier.counts.hits >= 8
            await tier.close()

    @pytest.mark.anyio
    async def test_a_server_that_ends_does_not_wait_for_loans(
        self, ctx: TierContext, arena: Arena, tmp_path: Path
    ) -> None:
        with process(tmp_path, listen=(f"unix://{tmp_path}/ends",)) as server:
            tier = Server(ServerOptions(url=server.url), ctx)
            await tier.open()
            await self.put(tier, 1)
            (obj,) = await self.held(tier, 1)
            assert server.stop(patience=8) == 0, server.log.read_text()
            assert verify(obj, key_of(1)) == self.bytes_of(arena, 1)
            obj.lease.release()
            await tier.close()

    @pytest.mark.anyio
    async def test_a_server_that_is_killed_leaves_what_it_lent(
        self, ctx: TierContext, arena: Arena, tmp_path: Path
    ) -> None:
        right = self.bytes_of(arena, 1)
        listen = (f"unix://{tmp_path}/killed",)
        with process(tmp_path, listen=listen) as server:
            tier = Server(ServerOptions(url=server.url), ctx)
            await tier.open()
            await self.put(tier, 1)
            (obj,) = await self.held(tier, 1)
            server.kill()
            assert verify(obj, key_of(1)) == right
        with process(tmp_path, listen=listen) as server:
            (absent,) = reads = [Read(key_of(1), ALL)]
            await tier.read(reads)
            assert absent.lost is Lost.ABSENT
            assert tier.counts.extra["restarts"] == 1
            await self.put(tier, 2)
            (other,) = await self.held(tier, 2)
            assert verify(obj, key_of(1)) == right
            assert verify(other, key_of(2)) == self.bytes_of(arena, 2)
            other.lease.release()
        obj.lease.release()
        await tier.close()


BORROWER = """
import os, signal
import anyio
from tierloom.stages.memory.arena import Arena
from tierloom.testing import ALL, NAMESPACE, Pool, key_of
from tierloom.stages.tiers.contract.tier import Read, TierContext
from tierloom.stages.tiers.server.tier import Server, ServerOptions

async def main():
    arena = Arena(1 << 20, huge_pages=False)
    tier = Server(ServerOptions(url={url!r}), TierContext(arena, NAMESPACE, Pool()))
    await tier.open()
    reads = [Read(key_of(1), ALL), Read(key_of(2), ALL)]
    await tier.read(reads)
    assert arena.leases == 0 and all(read.object for read in reads)
    os.kill(os.getpid(), signal.SIGKILL)

anyio.run(main)
"""


def test_a_client_that_dies_gives_everything_back(within: Within) -> None:
    arena = Arena(2 * SIZE, huge_pages=False)
    fill(within.urls[1], arena, 1, 2)
    arena.close()
    most = within.serving.listener.lending.nbytes
    env = os.environ | {"PYTHONPATH": f"{ROOT}/src", "PYTHONSAFEPATH": "1"}
    run = subprocess.Popen([sys.executable, "-c", BORROWER.format(url=within.urls[1])], env=env)
    while run.poll() is None:
        most = max(most, within.serving.listener.lending.nbytes)
        time.sleep(0.001)
    assert run.returncode == -signal.SIGKILL
    assert most == 2 * SIZE
    eventually(lambda: within.serving.listener.lending.nbytes == 0)


def test_shared_memory_cannot_be_written_or_cut_by_others() -> None:
    arena = Arena(1 << 20, huge_pages=False, shared=True)
    assert arena.fd >= 0
    with pytest.raises(PermissionError):
        mmap.mmap(arena.fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 4096)
    with pytest.raises(PermissionError):
        os.pwrite(arena.fd, b"x", 0)
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    lease = arena.lease(4096)
    lease.view[:5] = b"hello"
    assert os.pread(arena.fd, 5, lease.offset) == b"hello"
    lease.release()
    fd = arena.fd
    arena.close()
    with pytest.raises(OSError):
        os.fstat(fd)


def test_another_arenas_lease_is_not_kept() -> None:
    one, two = (Arena(8192, 8192, huge_pages=False) for _ in range(2))
    lease = one.lease(4096)
    with pytest.raises(ValueError, match="another's memory"):
        two.keep(lease)
    lease.release()
    one.close()
    two.close()
