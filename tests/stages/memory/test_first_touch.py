"""Memory touched ahead: all of it and no more, no byte changed, an end at once."""

from __future__ import annotations

import ctypes
import mmap
import threading
import time

import numpy as np
import pytest

from tierloom.stages.memory import arena as arenas, first_touch
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.memory.arena import HUGE, Arena
from tierloom.stages.memory.first_touch import STEP, FirstTouch, populate
from tierloom.stages.memory.page_lock import LEFT, available

SIZE = 8 << 20
_PROBE = mmap.mmap(-1, PAGE)

pytestmark = pytest.mark.skipif(
    not populate(ctypes.addressof(ctypes.c_char.from_buffer(_PROBE)), PAGE),
    reason="needs Linux 5.14",
)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    monkeypatch.setattr(first_touch, "_REST", 0)
    monkeypatch.setattr(first_touch, "available", lambda high: 1 << 40)


def resident(arena):
    """Which pages of its mapping are there, those around it included."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(arena._map))
    pages = np.zeros(len(arena._map) // PAGE, np.uint8)
    mincore = ctypes.CDLL(None).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    assert mincore(start, len(arena._map), pages.ctypes.data) == 0
    first = (arena.address - start) // PAGE
    return (pages & 1).astype(bool), slice(first, first + arena.total // PAGE)


def through(arena):
    arena._ahead._thread.join(60)
    assert not arena._ahead._thread.is_alive()


@pytest.mark.parametrize("shared", [False, True])
def test_all_of_it_and_no_more(shared):
    arena = Arena(SIZE, SIZE + PAGE, huge_pages=False, shared=shared)
    assert not resident(arena)[0].any()
    arena.touch_ahead()
    arena.touch_ahead()
    through(arena)
    pages, mine = resident(arena)
    assert pages[mine].all()
    pages[mine] = False
    assert not pages.any()
    assert arena._ahead.touched == arena.total
    arena.close()


def test_no_byte_is_changed():
    """Whoever writes meanwhile finds what was written."""
    arena = Arena(4 * SIZE, huge_pages=False)
    lease = arena.lease(4 * SIZE)
    words = np.frombuffer(lease.view, np.uint64)
    arena.touch_ahead()
    for turn in range(1, 4):
        words[:: PAGE // 8] = turn
        assert (words[:: PAGE // 8] == turn).all()
    through(arena)
    assert (words[:: PAGE // 8] == 3).all()
    assert not words[1 :: PAGE // 8].any()
    del words
    lease.release()
    arena.close()


@pytest.mark.parametrize(
    ("free", "least"), [(LEFT + 3 * STEP, LEFT), (LEFT, LEFT), (0, LEFT), (16 * STEP, 0)]
)
def test_no_more_than_is_available(monkeypatch, free, least):
    """Nor a quarter of that. It looks again later, and goes on when there is more."""
    looks, made = threading.Semaphore(0), threading.Event()
    there = [free, 1 << 40]

    def left(high):
        assert high
        assert made.wait(30)
        looks.release()
        return there[0] - touching.touched

    monkeypatch.setattr(first_touch, "available", left)
    monkeypatch.setattr(first_touch, "_AGAIN", 0.01)
    monkeypatch.setattr(first_touch, "LEFT", least)
    arena = Arena(SIZE, huge_pages=False)
    touching = FirstTouch(arena.address, arena.total)
    made.set()
    for _ in range(5):
        assert looks.acquire(timeout=30)
    assert touching.touched == max(0, free - max(least, free // 4))
    del there[0]
    touching._thread.join(60)
    assert touching.touched == arena.total
    arena.close()


def test_the_arena_is_closed_meanwhile(monkeypatch):
    """Nothing is touched after `close` has returned, at whatever point that was."""
    calls = []

    def noted(address, nbytes):
        calls.append((time.monotonic(), address))
        return populate(address, nbytes)

    monkeypatch.setattr(first_touch, "populate", noted)
    for pause in np.linspace(0, 0.01, 20):
        arena = Arena(8 * SIZE, huge_pages=False)
        arena.touch_ahead()
        time.sleep(pause)
        arena.close()
        closed = time.monotonic()
        arena._ahead._thread.join(30)
        assert all(at <= closed for at, _ in calls)
        assert arena._ahead.touched < arena.total


def test_leases_that_are_out_do_not_keep_it_going():
    """A pipeline that ends leaves an arena that somebody still uses as it is."""
    arena = Arena(64 * SIZE, huge_pages=False)
    lease = arena.lease(PAGE)
    arena.touch_ahead()
    arena.retire()
    arena._ahead._thread.join(30)
    assert not arena._ahead._thread.is_alive()
    assert arena._ahead.touched < arena.total
    lease.view[:] = b"1" * PAGE
    lease.release()
    arena.retire()
    with pytest.raises(ValueError, match="released"):
        arena.view[:1]


def test_a_system_that_cannot(monkeypatch):
    monkeypatch.setattr(first_touch, "_POPULATE_WRITE", 999)
    arena = Arena(SIZE, huge_pages=False)
    arena.touch_ahead()
    through(arena)
    assert arena._ahead.touched == 0
    arena.close()


def test_a_group_is_not_slowed_down(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 8000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/a\n")
    group = tmp_path / "sys/fs/cgroup/a"
    group.mkdir(parents=True)
    for name, value in {"max": 6 << 20, "high": 4 << 20, "current": 1 << 20}.items():
        (group / f"memory.{name}").write_text(str(value))
    (group / "memory.stat").write_text("inactive_file 0\n")
    assert available(tmp_path) == 5 << 20
    assert available(tmp_path, high=True) == 3 << 20


def test_reserved_huge_pages(monkeypatch):
    """Where there are none, or too few, files in memory have pages as before."""
    asked = []
    sealed = arenas._sealed

    def noted(nbytes, flags=0):
        asked.append((nbytes, flags))
        return sealed(nbytes, flags)

    monkeypatch.setattr(arenas, "_sealed", noted)
    arena = Arena(1 << 44, shared=True)
    assert arena.fd >= 0
    assert [bool(flags) for _, flags in asked] == [True, False]
    assert asked[0][0] % HUGE == 0
    arena.close()
