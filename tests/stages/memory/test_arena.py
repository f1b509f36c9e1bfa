"""Arena: leases, the two budgets, and waiting for room."""

from __future__ import annotations

import os
from pathlib import Path

import anyio
import pytest

from tierloom.stages.errors import ArenaFull
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.memory.arena import HUGE, Arena


@pytest.fixture
def arena():
    arena = Arena(8 * PAGE, 8 * PAGE, huge_pages=False)
    yield arena
    arena.close()


def test_a_lease_is_counted(arena):
    lease = arena.lease(PAGE + 1)
    assert lease.nbytes == 2 * PAGE
    assert lease.address % PAGE == 0
    assert arena.address % HUGE == 0
    lease.retain().release()
    assert arena.leases == 1
    lease.release()
    assert arena.leases == arena.used == 0
    with pytest.raises(RuntimeError, match="released twice"):
        lease.release()
    with pytest.raises(RuntimeError, match="after its last release"):
        lease.retain()


def test_a_lease_is_one_piece_of_memory(arena):
    one, two = arena.lease(PAGE), arena.lease(PAGE)
    one.view[:] = b"1" * PAGE
    two.view[:] = b"2" * PAGE
    assert bytes(one.view) == b"1" * PAGE
    one.release()
    two.release()


def test_flight_has_a_budget(arena):
    lease = arena.lease(6 * PAGE)
    with pytest.raises(ArenaFull, match=r"raise budget\.arena"):
        arena.lease(3 * PAGE)
    arena.keep(lease)
    lease.release()
    assert arena.flight == 0
    other = arena.lease(8 * PAGE)
    other.release()
    arena.unkeep(lease)


def test_trim_gives_back(arena):
    lease = arena.lease(8 * PAGE)
    lease.trim(PAGE + 1)
    assert lease.nbytes == 2 * PAGE
    assert arena.flight == 2 * PAGE
    with pytest.raises(ValueError):
        lease.trim(3 * PAGE)
    lease.release()


def test_reclaim_makes_a_hole(arena):
    kept = []
    for _ in range(15):
        lease = arena.lease(PAGE)
        arena.keep(lease)
        lease.release()
        kept.append(lease)
    with pytest.raises(ArenaFull, match="no hole"):
        arena.lease(4 * PAGE)
    arena.reclaim.append(lambda: bool(kept) and (arena.unkeep(kept.pop()), True)[1])
    lease = arena.lease(4 * PAGE)
    assert len(kept) == 12
    lease.release()
    while kept:
        arena.unkeep(kept.pop())


def test_room_is_promised_in_turn(arena):
    async def main():
        await arena.promises.reserve(8 * PAGE)
        async with anyio.create_task_group() as group:
            group.start_soon(arena.promises.reserve, 2 * PAGE)
            await anyio.wait_all_tasks_blocked()
            arena.promises.unreserve(8 * PAGE)
        with pytest.raises(ArenaFull, match="never fit"):
            await arena.promises.reserve(9 * PAGE)
        with anyio.move_on_after(0.01) as scope:
            await arena.promises.reserve(7 * PAGE)
        assert scope.cancelled_caught
        arena.promises.unreserve(2 * PAGE)
        with anyio.fail_after(10):
            await arena.promises.reserve(8 * PAGE)

    anyio.run(main)


def test_closed_with_leases_out():
    arena = Arena(PAGE, huge_pages=False)
    lease = arena.lease(PAGE)
    with pytest.raises(RuntimeError, match="1 leases still out"):
        arena.close()
    lease.release()
    arena.close()


def flags_of(arena):
    """What the kernel says of the mapping that the arena lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            start, end = (int(n, 16) for n in first.split("-"))
            inside = start <= arena.address < end
        elif inside and first == "VmFlags:":
            return rest.split()
    return None


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's smaps")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("huge_pages", [False, True])
def test_a_child_gets_no_copy(shared, huge_pages):
    """After a fork the next write would move a page from under a device that has locked it."""
    arena = Arena(8 * PAGE, shared=shared, huge_pages=huge_pages)
    assert "dc" in flags_of(arena)
    arena.close()


def test_a_child_that_closes_an_arena_does_no_harm():
    arena = Arena(8 * PAGE, huge_pages=False)
    lease = arena.lease(PAGE)
    lease.view[:] = b"1" * PAGE
    child = os.fork()
    if not child:
        try:
            lease.release()
            arena.close()
        finally:
            os._exit(0 if arena.leases == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert bytes(lease.view) == b"1" * PAGE
    lease.release()
    arena.close()
