"""Space: every byte is free or taken once, whatever the order of events."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings, strategies as st

from tierloom.stages.memory.allocator import PAGE, Space


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.booleans()), max_size=80), st.integers(1, 4))
def test_books_balance(steps, pieces):
    space, held = Space(64 * PAGE), []
    for pages, give in steps:
        if give and held:
            for piece in held.pop(pages % len(held)):
                space.give(*piece)
        else:
            taken = space.take_split(pages * PAGE, pieces)
            if taken is None:
                assert pages * PAGE > space.largest
                continue
            assert len(taken) <= pieces
            assert sum(n for _, n in taken) == pages * PAGE
            held.append(taken)
        spans = sorted((piece for taken in held for piece in taken), key=lambda piece: piece[0])
        assert all(a + n <= b for (a, n), (b, _) in pairwise(spans))
        assert space.used == sum(n for _, n in spans)
    for taken in held:
        for piece in taken:
            space.give(*piece)
    assert space.largest == space.free_bytes == 64 * PAGE  # all merged again


def test_exact_holes_come_first():
    space = Space(10 * PAGE)
    at = [space.take(n * PAGE) for n in (3, 1, 2, 1, 3)]
    for i, n in ((0, 3), (2, 2), (4, 3)):
        space.give(at[i], n * PAGE)
    assert space.take(2 * PAGE) == at[2]
    assert space.take(1) == at[0]  # rounded up to a page
    assert space.used == 5 * PAGE


def test_full_and_empty():
    assert Space(0).take(1) is None
    space = Space(2 * PAGE + 5)
    assert space.total == 2 * PAGE
    assert space.take(3 * PAGE) is None
    assert space.take_split(3 * PAGE, 4) is None
    late = Space(4 * PAGE, empty=True)
    assert late.take(PAGE) is None
    late.give(2 * PAGE, PAGE)
    late.give(PAGE, PAGE)
    assert late.take(2 * PAGE) == PAGE


def test_spread_over_holes():
    space = Space(6 * PAGE)
    at = [space.take(PAGE) for _ in range(6)]
    for i in (0, 2, 4):
        space.give(at[i], PAGE)
    assert space.take_split(3 * PAGE, 2) is None
    assert sorted(space.take_split(3 * PAGE, 3)) == [(at[i], PAGE) for i in (0, 2, 4)]
