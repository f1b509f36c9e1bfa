"""Three instances that put, evict, crash and restart, over a directory that fails and forgets.

What is found may be wrong at any moment: whoever asks a holder that has nothing has a miss. When
everybody has had two heartbeats it is right, to the last chunk.
"""

from __future__ import annotations

import asyncio
import random

import pytest
import servers
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from tierloom.stages.directory.shared.announcer import Announcer
from tierloom.stages.directory.shared.embedded import EmbeddedDirectory
from tierloom.stages.directory.shared.redis_directory import RedisDirectory
from tierloom.stages.errors import ConfigError, TierDown
from tierloom.stages.tiers.redis.tier import RedisOptions
from tierloom.testing import Clock
from tierloom.testing.directories import names_of, worker_of

from .standins import Frail

NAMES = names_of(1, 24)
HEARTBEAT = 0.2
who = st.integers(0, 2)
which = st.integers(0, len(NAMES) - 1)
tiers = st.integers(0, 1)


class Instance:
    """An engine: what it holds in memory and on disk, and what it tells."""

    def __init__(self, number):
        self.number, self.held, self.announcer = number, [{}, {}], None

    def begin(self, machine):
        machine.processes += 1
        worker = worker_of(f"i{self.number}", machine.processes, heartbeat=machine.heartbeat)
        self.announcer = Announcer(machine.frail, worker, clock=machine.clock)
        for name in self.held[1]:
            self.announcer.note(name, 1, True)

    def tiers_of(self, name):
        return sum(1 << tier for tier in (0, 1) if name in self.held[tier])


class Cluster(RuleBasedStateMachine):
    heartbeat = HEARTBEAT

    def __init__(self):
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock, self.processes = self.make_clock(), 0
        self.frail = Frail(self.loop.run_until_complete(self.make()))
        self.instances = [Instance(i) for i in range(3)]
        self.zombies, self.finds, self.wrong = [], 0, 0
        for instance in self.instances:
            instance.begin(self)

    def make_clock(self):
        return Clock()

    async def make(self):
        return EmbeddedDirectory(self.clock)

    def forget(self):
        self.frail.inner = self.loop.run_until_complete(self.make())

    def pass_time(self, seconds):
        self.clock.now += seconds

    def teardown(self):
        self.loop.run_until_complete(self.frail.inner.close())
        self.loop.close()

    @rule(i=who, names=st.lists(which, max_size=8), tier=tiers)
    def put(self, i, names, tier):
        instance = self.instances[i]
        for name in map(NAMES.__getitem__, names if instance.announcer else ()):
            instance.held[tier][name] = True
            instance.announcer.note(name, tier, True)

    @rule(i=who, names=st.lists(which, max_size=8), tier=tiers)
    def evict(self, i, names, tier):
        instance = self.instances[i]
        for name in map(NAMES.__getitem__, names if instance.announcer else ()):
            if instance.held[tier].pop(name, False):
                instance.announcer.note(name, tier, False)

    @rule(i=who)
    def crash(self, i):
        self.zombies = [z for z in self.zombies if z._worker.instance != f"i{i}"]
        self.instances[i].announcer = None
        self.instances[i].held[0].clear()

    @precondition(lambda self: any(i.announcer is None for i in self.instances))
    @rule()
    def restart(self):
        next(i for i in self.instances if i.announcer is None).begin(self)

    @rule(i=who)
    def is_started_twice(self, i):
        """The process before it lives, and still tells; it has nothing that anybody can reach.
        Who joins first in a directory that has lost both is not known to be older, so it joined."""
        old, members = self.instances[i].announcer, self.call(self.frail.inner.workers())
        if old is not None and old.epoch in {member.epoch for member in members.values()}:
            self.zombies.append(old)
            self.instances[i].held[0].clear()
            self.instances[i].begin(self)
            self.frail.before = self.frail.after = 0
            self.step(self.instances[i].announcer)

    @rule(i=who, times=st.integers(1, 3))
    def tell(self, i, times):
        for _ in range(times):
            self.step(self.instances[i].announcer)

    @rule()
    def zombies_tell(self):
        for zombie in self.zombies:
            self.step(zombie)

    @rule(before=st.integers(0, 2), after=st.integers(0, 2))
    def calls_fail(self, before, after):
        self.frail.before, self.frail.after = before, after

    @rule()
    def is_emptied(self):
        self.zombies.clear()
        self.forget()

    @rule(seconds=st.sampled_from([0.01, HEARTBEAT / 2, 3 * HEARTBEAT]))
    def time_passes(self, seconds):
        self.pass_time(seconds)

    @rule()
    def sweep(self):
        self.call(self.frail.inner.sweep())

    @rule(start=which)
    def ask(self, start):
        """A miss is reported by who asked."""
        found = self.call(self.frail.inner.find(NAMES[start:]))
        members = self.call(self.frail.inner.workers())
        for name, holders in zip(NAMES[start:], found, strict=False):
            for holder in holders:
                self.finds += 1
                member = members.get(holder.number)
                instance = self.instances[int(member.record.instance[1:])] if member else None
                if instance is None or not instance.tiers_of(name):
                    self.wrong += 1
                    self.call(self.frail.inner.report(name, holder))

    @rule()
    def two_heartbeats(self):
        self.frail.before = self.frail.after = 0
        for _ in range(12):
            self.pass_time(self.heartbeat / 4)
            for zombie in self.zombies:
                self.step(zombie)
            for instance in self.instances:
                for _ in range(3):
                    self.step(instance.announcer)
        members = self.call(self.frail.inner.workers())
        living = [i for i in self.instances if i.announcer is not None]
        assert sorted(m.record.instance for m in members.values()) == [
            f"i{i.number}" for i in living
        ]
        right = [
            {(i.number, i.tiers_of(name)) for i in living if i.tiers_of(name)} for name in NAMES
        ]
        for start in range(len(NAMES)):
            found = self.call(self.frail.inner.find(NAMES[start:]))
            until = next((n for n in range(start, len(NAMES)) if not right[n]), len(NAMES))
            assert [
                {(int(members[h.number].record.instance[1:]), h.tiers) for h in holders}
                for holders in found
            ] == right[start:until]

    def step(self, announcer):
        if announcer is not None:
            try:
                self.loop.run_until_complete(announcer._step())
            except ConfigError:
                assert announcer in self.zombies
            except TierDown:
                pass

    def call(self, awaitable):
        return self.loop.run_until_complete(awaitable)


def test_in_this_process() -> None:
    run_state_machine_as_test(
        Cluster,
        settings=settings(
            max_examples=25, stateful_step_count=40, deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


@pytest.mark.server
def test_in_redis() -> None:
    """The same steps in one long walk, as time passes there by itself."""
    with servers.redis() as server:

        class Served(Cluster):
            heartbeat = 0.5

            def make_clock(self):
                return self.loop.time

            async def make(self):
                url = f"redis://127.0.0.1:{server.port}"
                return RedisDirectory(RedisOptions(url=url, stall=10.0), timeout=20.0)

            def forget(self):
                servers.ask(server.port, "FLUSHALL")

            def pass_time(self, seconds):
                self.loop.run_until_complete(asyncio.sleep(seconds))

        walk(Served(), random.Random(1), 200)


def walk(machine, rng, steps):
    """Random steps; in the end, and now and then, all must be right."""
    some = lambda: [rng.randrange(len(NAMES)) for _ in range(6)]  # noqa: E731
    for n in range(steps):
        i, step = rng.randrange(3), rng.randrange(24)
        if step < 7:
            machine.put(i, some(), rng.randrange(2))
        elif step < 10:
            machine.evict(i, some(), rng.randrange(2))
        elif step < 15:
            machine.tell(i, 2)
        elif step < 18:
            machine.ask(rng.randrange(len(NAMES)))
        elif step < 20:
            machine.calls_fail(rng.randrange(2), rng.randrange(2))
        elif step == 20:
            machine.crash(i)
        elif step == 21:
            machine.zombies_tell()
            if any(each.announcer is None for each in machine.instances):
                machine.restart()
        elif step == 22:
            rng.choice([machine.is_emptied, machine.sweep])()
            machine.is_started_twice(i)
        else:
            machine.time_passes(machine.heartbeat / 2)
        if n % 100 == 99:
            machine.two_heartbeats()
    machine.teardown()
