"""How much of a prompt a place without an index has: few questions, in few round trips."""

from __future__ import annotations

import random

import pytest

from tierloom.stages.errors import Lost
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.concurrently import PrefixSearch
from tierloom.stages.tiers.contract.tier import Read
from tierloom.stages.tiers.contract.unreadable import _DOUBTED
from tierloom.stages.tiers.wrappers.mock import Mock, MockOptions
from tierloom.testing import ALL, TierBench, key_of


class Limits:
    timeout, fails, probe = 30.0, 3, 1.0


def searched(there, width):
    """The length that was found, how many questions that took, and how many rounds."""
    search, asked, rounds = PrefixSearch(len(there), width), [], 0
    while search.asks:
        asked += search.asks
        rounds += 1
        search.told([there[i] for i in search.asks])
    assert len(set(asked)) == len(asked), "nothing is asked twice"
    return search.length, asked, rounds


@pytest.mark.parametrize(
    ("count", "width", "questions", "deep"),
    [(64, 3, 11, 3), (782, 3, 20, 6), (64, 1, 9, 7), (782, 1, 12, 11), (1, 3, 1, 1), (2, 1, 2, 1)],
)
def test_every_length(count, width, questions, deep):
    for length in range(count + 1):
        found, asked, rounds = searched([True] * length + [False] * (count - length), width)
        assert found == length
        assert len(asked) <= questions
        assert rounds <= deep
        if length in (0, count):
            assert rounds == 1


def test_nothing_is_asked_of_an_empty_row():
    assert searched([], 3) == (0, [], 0)


def test_holes():
    """Any length will do that no answer speaks against."""
    rng = random.Random(1)
    for _ in range(2000):
        there = [rng.random() < 0.8 for _ in range(rng.randrange(1, 100))]
        length, asked, _ = searched(there, rng.choice((1, 3)))
        assert all(there[i] == (i < length) for i in asked if i <= length)
        assert length == len(there) or length in asked
        assert not length or length - 1 in asked


class Asked(Mock):
    """Notes what it is asked for."""

    def __init__(self, ctx):
        super().__init__(MockOptions(latency=0.0), ctx)
        self.asked = []
        self.lies = set()
        """Names that it says it has, and does not give."""

    async def size(self, name):
        self.asked.append(name)
        return 4096 if name in self.lies else await super().size(name)


@pytest.mark.anyio
class TestDoubts(TierBench):
    def make(self, ctx, folder, clock, **options):
        return CircuitBreaker(Asked(ctx), "cold", Limits(), clock=clock)

    async def test_what_did_not_come_is_asked_for(self, tier, clock):
        keys = [key_of(seed) for seed in range(32)]
        await self.put(tier, *range(32))
        await tier.tier.delete([keys[3]])
        assert await tier.prefix_length(keys) == 32, "a guess"
        assert await self.get(tier, 3) is Lost.ABSENT
        assert await tier.prefix_length(keys) == 3
        assert await tier.prefix_length(keys[4:]) == 28
        await self.put(tier, 3)
        assert await tier.prefix_length(keys) == 32
        assert keys[3] not in tier.unread
        assert isinstance(await self.get(tier, 3), bytes)

    async def test_another_has_put_it_again(self, ctx, tier, clock):
        """Nobody told this reader."""
        keys = [key_of(seed) for seed in range(32)]
        await self.put(tier, *range(32))
        await tier.tier.delete([keys[3]])
        assert await self.get(tier, 3) is Lost.ABSENT
        await self.put(tier.tier, 3)
        assert await tier.prefix_length(keys) == 32
        assert keys[3] not in tier.unread

    async def test_who_lies_twice_is_not_believed_for_a_minute(self, tier, clock):
        key = key_of(1)
        tier.tier.lies.update(tier.tier._named([key]))
        for _ in range(2):
            assert key not in tier.unread
            assert await tier.prefix_length([key]) == 1
            assert await self.get(tier, 1) is Lost.ABSENT
        assert key in tier.unread
        clock.now += 61
        assert key not in tier.unread

    async def test_a_doubt_passes(self, tier, clock):
        tier.tier.lies.update(tier.tier._named([key_of(1)]))
        for _ in range(3):
            assert await self.get(tier, 1) is Lost.ABSENT
            clock.now += 61
            assert key_of(1) not in tier.unread

    async def test_many_doubts_cost_a_few_questions(self, tier):
        keys = [key_of(seed) for seed in range(200)]
        await tier.read([Read(key, ALL) for key in keys])
        tier.tier.asked.clear()
        assert await tier.prefix_length(keys) == 0
        assert len(tier.tier.asked) == _DOUBTED

    async def test_a_tier_that_fails_has_nothing(self, tier, monkeypatch):
        async def fails(keys):
            raise OSError("gone")

        monkeypatch.setattr(tier.tier, "exists", fails)
        assert await tier.prefix_length([key_of(1)]) == 0
