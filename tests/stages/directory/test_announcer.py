"""What a worker tells in the background, and what it does when the directory is lost."""

from __future__ import annotations

import random
import threading
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
import pytest

from tierloom.stages.directory.shared import announcer as module
from tierloom.stages.directory.shared.announcer import Announcer
from tierloom.stages.directory.shared.contract import Roster
from tierloom.stages.directory.shared.embedded import EmbeddedDirectory
from tierloom.stages.directory.shared.records import ChunkHolder, number_of
from tierloom.stages.errors import ConfigError, InputError
from tierloom.testing import Clock, directories
from tierloom.testing.directories import names_of

from .standins import Frail

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


def worker_of(instance, process=1, **fields):
    return directories.worker_of(instance, process, **({"heartbeat": 0.3} | fields))


@asynccontextmanager
async def running(directory, *workers):
    announcers = [Announcer(directory, worker) for worker in workers]
    async with anyio.create_task_group() as tasks:
        for announcer in announcers:
            tasks.start_soon(announcer.run)
        yield announcers
        tasks.cancel_scope.cancel()


async def until(condition):
    with anyio.fail_after(20):
        while not await condition():  # noqa: ASYNC110 (nobody tells)
            await anyio.sleep(0.01)


async def finds(directory, names, count):
    await until(lambda: _count_is(directory, names, count))


async def _count_is(directory, names, count):
    return len(await directory.find(names)) == count


async def test_what_comes_and_goes_is_told() -> None:
    directory, names = EmbeddedDirectory(), names_of(1, 1000)
    async with running(directory, worker_of("a"), worker_of("b")) as (a, b):
        for name in names:
            a.note(name, 0, True)
        b.note(names[0], 1, True)
        await finds(directory, names, 1000)
        for name in names[10:]:
            a.note(name, 1, True)
            a.note(name, 0, False)
        a.note(names[5], 0, False)
        await finds(directory, names, 5)
        await until(lambda: _tiers_are(directory, names[10:], 2))
        assert len((await directory.find(names))[0]) == 2
    await a.leave()
    assert (await directory.find(names))[:2] == [(ChunkHolder(number_of(b.epoch), 2),)]


async def _tiers_are(directory, names, tiers):
    found = await directory.find(names)
    return len(found) == len(names) and {h.tiers for holders in found for h in holders} == {tiers}


async def test_a_directory_that_came_back_empty_is_told_all() -> None:
    frail, names = Frail(EmbeddedDirectory()), names_of(1, 1000)
    async with running(frail, worker_of("a"), worker_of("b")) as (a, b):
        for name in names:
            a.note(name, 0, True)
        b.note(names[3], 0, True)
        await finds(frail, names, 1000)
        frail.inner = EmbeddedDirectory()
        a.note(names[999], 0, False)
        await finds(frail, names, 999)
        await until(lambda: _holders_are(frail, names[3], 2))
        assert (a.snapshots, b.snapshots) == (2, 2)


async def _holders_are(directory, name, count):
    return [len(holders) for holders in await directory.find([name])] == [count]


async def test_answers_that_are_lost_cost_no_snapshot() -> None:
    frail, names = Frail(EmbeddedDirectory()), names_of(1, 300)
    async with running(frail, worker_of("a")) as (a,):
        await until(lambda: _has_joined(a))
        for i, name in enumerate(names):
            a.note(name, 0, True)
            if i % 100 == 0:
                frail.after = frail.before = 1
                await until(lambda: _is_through(frail))
        await finds(frail, names, 300)
        assert a.snapshots == 1


async def _has_joined(announcer):
    return announcer.epoch > 0


async def _is_through(frail):
    return not frail.before and not frail.after


async def test_one_that_is_down_is_said_once(caplog) -> None:
    frail, names = Frail(EmbeddedDirectory()), names_of(1, 10)
    frail.before = 3
    async with running(frail, worker_of("a", heartbeat=0.05)) as (a,):
        for name in names:
            a.note(name, 0, True)
        await until(lambda: _is_through(frail))
        await finds(frail, names, 10)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "it is down" in caplog.text
    frail.before = 1
    await a.leave()  # which is told nobody


async def test_a_name_that_is_taken_is_asked_for_again(monkeypatch, caplog) -> None:
    """It is said once, and when the other is gone all is told."""
    monkeypatch.setattr(module, "_LONGEST", 0.05)
    directory, names = EmbeddedDirectory(), names_of(1, 10)
    async with running(directory, worker_of("a", 1)) as (old,):
        old.note(names[0], 0, True)
        await finds(directory, names, 1)
        async with running(directory, worker_of("a", 2)) as (new,):
            await until(lambda: _is_refused(old))
            new.note(names[1], 0, True)
            await finds(directory, names[1:], 1)
            assert await directory.find(names) == []
            assert new.problem is None
            await anyio.sleep(0.2)
        await finds(directory, names, 1)
        assert old.problem is None
    assert caplog.text.count("give each engine an `instance` of its own") == 1


async def _is_refused(announcer):
    return isinstance(announcer.problem, ConfigError)


async def test_from_many_threads() -> None:
    directory, names = EmbeddedDirectory(), names_of(1, 200)
    async with running(directory, worker_of("a")) as (a,):

        def work(part):
            rng = random.Random(part)
            mine = names[part * 50 : part * 50 + 50]
            for _ in range(3000):
                a.note(rng.choice(mine), rng.randrange(2), rng.random() < 0.6)
            for name in mine:
                a.note(name, 0, True)
                a.note(name, 1, False)

        threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            await directory.find(names)
            await anyio.lowlevel.checkpoint()
        await until(lambda: _tiers_are(directory, names, 1))


async def test_all_is_told_at_a_pace() -> None:
    """By a clock that does not move: what it waits is what the pace says."""
    clock = Clock()
    directory, names = EmbeddedDirectory(clock), names_of(1, 5000)
    a = Announcer(directory, worker_of("a"), pace=10_000, clock=clock)
    for name in names:
        a.note(name, 0, True)
    waits = []
    while len(directory) < 5000:
        waits.append(await a._step())
    assert sum(waits) == pytest.approx(5000 / 10_000, rel=0.1)
    assert max(waits) < 0.06


async def test_what_goes_waits_for_nothing(monkeypatch) -> None:
    """What came may wait: until it is told, nobody asks for it."""
    monkeypatch.setattr(module, "_PAUSE", 60.0)
    directory, names = EmbeddedDirectory(), names_of(1, 10)
    async with running(directory, worker_of("a", heartbeat=300.0)) as (a,):
        for name in names:
            a.note(name, 0, True)
        a.note(names[9], 0, False)
        await finds(directory, names, 9)
        for last in (8, 7):
            a.note(names[last], 1, True)
            threading.Thread(target=a.note, args=(names[last], 0, False)).start()
            await until(lambda last=last: _tiers_are(directory, names[last : last + 1], 2))
    a.note(names[0], 0, False)  # nobody listens any more


async def test_beats_are_made_when_they_are_due() -> None:
    clock = Clock()
    frail = Frail(EmbeddedDirectory(clock))
    a = Announcer(frail, worker_of("a", heartbeat=2.0), clock=clock)
    for _ in range(200):
        clock.now += 0.1
        await a._step()
    assert 15 <= frail.calls.count("beat") <= 21
    assert frail.calls.count("announce") == 0
    assert a.snapshots == 1


async def test_what_is_no_chunk_or_no_tier() -> None:
    a = Announcer(EmbeddedDirectory(), worker_of("a"))
    with pytest.raises(InputError, match="in tier 2 of 2"):
        a.note(names_of(1, 1)[0], 2, True)
    with pytest.raises(InputError, match="chunk 6162 in tier 0"):
        a.note(b"ab", 0, True)


async def test_who_a_number_is_is_asked_now_and_then() -> None:
    """Numbers of a directory that was lost are others' in the next."""
    clock = Clock()
    frail = Frail(EmbeddedDirectory(clock))
    roster = Roster(frail, keep=10.0, clock=clock)
    epoch = await frail.join(worker_of("a", heartbeat=60.0))
    number = number_of(epoch)
    found = [(ChunkHolder(number, 1), ChunkHolder(77, 1))] * 64
    for _ in range(3):
        (member,) = (await roster.members(found)).values()
        assert (member.epoch, member.record.instance) == (epoch, "a")
    assert frail.calls.count("workers") == 3, "77 is nobody, and is asked for again"
    assert await roster.members([(ChunkHolder(number, 1),)]) == {number: member}
    assert frail.calls.count("workers") == 3
    frail.inner = EmbeddedDirectory(clock)
    assert number_of(await frail.join(worker_of("b", heartbeat=60.0))) == number
    assert (await roster.members(found))[number].record.instance == "a"
    roster.forget(number)
    assert (await roster.members(found))[number].record.instance == "b"
    await frail.leave(epoch)
    frail.inner = EmbeddedDirectory(clock)
    clock.now += 11
    assert await roster.members(found) == {}
    assert await roster.members([]) == {}
