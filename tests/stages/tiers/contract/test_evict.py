"""Eviction policies: on traces against a reference and published figures, and by their rules."""

from __future__ import annotations

import random

import pytest

from tierloom.stages.tiers.contract.eviction import POLICIES

SHARES = (0.01, 0.05, 0.10, 0.25, 0.50)
FIGURES = {
    "lru": (0.0525, 0.1958, 0.2789, 0.3535, 0.3631),
    "fifo": (0.0505, 0.1750, 0.2480, 0.3262, 0.3554),
    "s3-fifo": (0.0770, 0.1942, 0.2443, 0.3338, 0.3627),
    "arc": (0.0649, 0.2102, 0.2843, 0.3355, 0.3627),
}
"""Block hit ratios on Mooncake's conversation trace, capacity as a share of its unique blocks."""


def nobody(key):
    return False


class Cache:
    """A cache of blocks as an index runs it: tail first, room is made as each block comes."""

    def __init__(self, policy, capacity, sizes=lambda block: 1):
        self.policy, self.capacity, self.sizes = POLICIES[policy](capacity), capacity, sizes
        self.kept, self.nbytes = set(), 0

    def request(self, blocks):
        """How many blocks were there from the first one on without a gap; then use them all."""
        hits = next((i for i, block in enumerate(blocks) if block not in self.kept), len(blocks))
        for block in reversed(blocks):
            if block in self.kept:
                self.policy.touch(block)
            else:
                self.bring(block)
        return hits

    def bring(self, block):
        size = self.sizes(block)
        self.policy.expect(block, size)
        while self.nbytes + size > self.capacity:
            gone = self.policy.victim(nobody, block)
            self.kept.remove(gone)
            self.nbytes -= self.sizes(gone)
        self.policy.add(block, size)
        self.kept.add(block)
        self.nbytes += size


class PlainLru:
    """The reference: time stamps and a search for the oldest, no queue."""

    def __init__(self, capacity):
        self.capacity, self.used, self.now = capacity, {}, 0
        self.order = []  # (stamp, block); stale ones are passed over

    def request(self, blocks):
        import heapq

        hits = 0
        while hits < len(blocks) and blocks[hits] in self.used:
            hits += 1
        for block in reversed(blocks):
            if block not in self.used and len(self.used) == self.capacity:
                while True:
                    stamp, oldest = heapq.heappop(self.order)
                    if self.used.get(oldest) == stamp:
                        del self.used[oldest]
                        break
            self.now += 1
            self.used[block] = self.now
            heapq.heappush(self.order, (self.now, block))
        return hits


def ratio(cache, requests):
    return sum(cache.request(blocks) for blocks in requests) / sum(map(len, requests))


def unique(requests):
    return len({block for blocks in requests for block in blocks})


@pytest.mark.parametrize("policy", FIGURES)
def test_published_figures(policy, conversation):
    blocks = unique(conversation)
    for share, figure in zip(SHARES, FIGURES[policy], strict=True):
        got = ratio(Cache(policy, int(blocks * share)), conversation)
        print(f"{policy} {share:.0%}: {got:.4f}, published {figure:.4f}")
        assert got == pytest.approx(figure, abs=0.01)


@pytest.mark.parametrize("share", SHARES)
def test_lru_is_exactly_lru(share, conversation):
    capacity = int(unique(conversation) * share)
    cache, plain = Cache("lru", capacity), PlainLru(capacity)
    assert all(cache.request(blocks) == plain.request(blocks) for blocks in conversation)
    assert cache.kept == set(plain.used)


@pytest.mark.parametrize("share", SHARES)
def test_lru_is_exactly_lru_here_too(share, generated):
    capacity = int(unique(generated) * share)
    cache, plain = Cache("lru", capacity), PlainLru(capacity)
    assert all(cache.request(blocks) == plain.request(blocks) for blocks in generated)
    assert cache.kept == set(plain.used)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gains_by_room(policy, generated):
    blocks = unique(generated)
    ratios = [ratio(Cache(policy, int(blocks * share)), generated) for share in (*SHARES, 1.0)]
    assert ratios == sorted(ratios)
    assert ratios[-1] > 0.2


@pytest.mark.parametrize("policy", POLICIES)
def test_exact_by_bytes(policy):
    """Sizes of one to a hundred, random use, removals and busy keys: books balance throughout."""
    rng = random.Random(1)
    sizes = [rng.randint(1, 100) for _ in range(400)]
    evict, kept = POLICIES[policy](2000), {}
    for _ in range(6000):
        key = min(int(rng.paretovariate(0.5)), 399)
        what = rng.random()
        if key in kept:
            if what < 0.1:
                evict.remove(key)
                del kept[key]
            else:
                evict.touch(key)
            continue
        busy = {k for k in kept if rng.random() < 0.05}
        evict.expect(key, sizes[key])
        while sum(kept.values()) + sizes[key] > 2000:
            gone = evict.victim(busy.__contains__, key)
            assert gone not in busy
            del kept[gone]
        evict.add(key, sizes[key])
        kept[key] = sizes[key]
    everything = set()
    while (gone := evict.victim(nobody)) is not None:
        assert gone not in everything
        everything.add(gone)
    assert everything == set(kept)


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_to_evict(policy):
    evict = POLICIES[policy](10)
    assert evict.victim(nobody) is None
    evict.touch(b"unknown")
    evict.remove(b"unknown")
    evict.add(b"a", 5)
    assert evict.victim(lambda key: True) is None
    assert evict.victim(nobody) == b"a"
    assert evict.victim(nobody) is None


def _order(policy, touched=""):
    evict = POLICIES[policy](4)
    for key in "abcd":
        evict.add(key, 1)
    for key in touched:
        evict.touch(key)
    return "".join(evict.victim(nobody) for _ in "abcd")


def test_rules():
    assert _order("lru", "ba") == "cdba"
    assert _order("fifo", "ba") == "abcd"
    assert _order("mru", "ba") == "abdc"
    assert _order("lfu", "aab") == "cdba"
    assert _order("s3-fifo", "a") == "bcda"
    assert _order("arc", "a") == "bcda"


def test_s3_fifo_remembers_ghosts():
    cache = Cache("s3-fifo", 10)
    cache.request([f"once{i}" for i in range(10)])
    for i in range(10):
        cache.bring(f"more{i}")
    cache.bring("once0")  # a ghost: straight into the main queue
    for i in range(30):
        cache.bring(f"flood{i}")
    assert "once0" in cache.kept


def test_arc_keeps_what_is_used_twice():
    cache = Cache("arc", 10)
    for _ in range(2):
        cache.request(["a", "b", "c"])
    for i in range(100):
        cache.bring(f"flood{i}")
    assert {"a", "b", "c"} <= cache.kept
