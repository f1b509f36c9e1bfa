"""The index of a local tier: aliases, time, pins."""

from __future__ import annotations

import pytest

from tierloom.stages.tiers.contract.index import FOREVER, Entry, Index
from tierloom.testing import Clock, key_of, links_of


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def index(clock):
    return Index("lru", 100, ttl=0.0, clock=clock, in_use=lambda busy: busy)


def entry(seed, *, tokens=64, expires=FOREVER, busy=False):
    links = links_of(seed, tokens)
    return Entry(links[-32:], links, 10, busy, expires)


def test_the_longest_common_part_is_found(index):
    index.add(entry(1))
    links = links_of(1)
    assert index.find(links) == (key_of(1), 4, 10)
    for grains in (1, 2, 3):
        other = links[: 32 * grains] + links_of(2)[32 * grains :]
        assert index.find(other) == (key_of(1), grains, 10)
    assert index.find(links + links_of(3)[:32]) == (key_of(1), 4, 10)
    assert index.find(links_of(2)) is None
    assert index.find(b"") is None


def test_an_alias_goes_with_the_object_it_points_to(index):
    first, second = entry(1), entry(1)
    second.links = first.links[:64] + links_of(2)[64:]
    second.key = second.links[-32:]
    index.add(first)
    index.add(second)
    half = first.links[:64] + links_of(3)[64:]
    assert index.find(half) == (second.key, 2, 10)
    assert index.remove(first)
    assert index.find(half) == (second.key, 2, 10)
    assert index.remove(second)
    assert index.find(half) is None
    assert not index._aliases
    assert index.nbytes == len(index) == 0


def test_only_this_very_entry_is_removed(index):
    old, new = entry(1), entry(1)
    index.add(old)
    assert index.remove(old)
    index.add(new)
    assert not index.remove(old)
    assert key_of(1) in index


def test_busy_and_pinned_entries_stay(index):
    for seed, busy in ((1, True), (2, False), (3, False)):
        index.add(entry(seed, busy=busy))
    assert index.pin(key_of(2), pinned=True)
    assert index.pin(key_of(2), pinned=True)
    assert not index.pin(key_of(9), pinned=True)
    assert index.evict().key == key_of(3)
    assert index.evict() is None
    index.pin(key_of(2), pinned=False)
    assert index.evict().key == key_of(2)


def test_a_lease_and_a_pin_are_apart(index):
    """What is protected both ways stays until neither does it."""
    index.add(entry(1))
    for leased, pinned, stays in [(1, 0, 1), (1, 1, 1), (0, 1, 1), (1, 1, 1), (1, 0, 1), (0, 0, 0)]:
        assert index.pin(key_of(1), pinned=bool(leased), lease=True)
        assert index.pin(key_of(1), pinned=bool(pinned))
        gone = index.evict()
        assert (gone is None) == bool(stays)


def test_what_is_over_is_not_there(clock):
    index = Index("lru", 100, ttl=60.0, clock=clock, in_use=lambda busy: False)
    for seed in (1, 2):
        index.add(entry(seed, expires=index.expiry()))
        clock.now += 40
    assert index.get(key_of(1)) is None
    assert index.find(links_of(1)) is None
    assert index.find(links_of(1)[:64] + links_of(3)[64:]) is None
    assert not index.pin(key_of(1), pinned=True)
    assert [e.key for e in index.expired()] == [key_of(1)]
    assert index.get(key_of(2)) is not None
