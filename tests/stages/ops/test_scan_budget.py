"""How much to read of progressive objects, on simulated links, against CacheGen's published rule.

Links change with each chunk, between 0.1 and 10 Gbit/s; a clock of its own counts what reading
and computing take. Both rules know what the first chunk's link gives on average.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest

from tierloom.stages.ops.scan_budget import ScanBudget

ELEMENTS = 1500 * 32 * 2 * 1024
"""Of a chunk of 1,500 tokens of an 8B model."""
LEVELS = ((2.37, 3.3e-2), (3.34, 6.3e-3), (4.80, 6.3e-4))
"""Bits per element and KL of encodings of their own, coarsest first."""
SCANS = ((1.99, 5.5e-2), (3.50, 6.0e-3), (5.09, 6.0e-4))
"""The same of scans, each with those before it."""
MEAN = 5e9 / 8


class End(NamedTuple):
    seconds: float
    """To the first token."""
    kl: float
    """Mean over chunks; of those that are computed it is 0."""


def nbytes(bits: float) -> int:
    return int(bits * ELEMENTS / 8)


def published(link: list[float], goal: float, compute: float) -> End:
    """The finest level of which all that is left would come in time, at the last chunk's rate; a
    chunk of which none would, or that is quicker to compute, is computed."""
    clock = kl = 0.0
    rate = MEAN
    for i, now in enumerate(link):
        for bits, loss in reversed(LEVELS):
            size = nbytes(bits)
            if (len(link) - i) * size / rate <= goal - clock and size / rate < compute:
                clock, kl, rate = clock + size / now, kl + loss, now
                break
        else:
            clock += compute
    return End(clock, kl / len(link))


def ours(link: list[float], goal: float, compute: float) -> End:
    """What `get` does, chunk by chunk; once it computes, it computes all the rest."""
    clock = kl = read = 0.0
    spent = 0.0
    for i, now in enumerate(link):
        rest = (len(link) - i) * compute
        usual = spent / read if read else 1 / MEAN
        end = min(goal, len(link) * compute)
        budget = ScanBudget(end - clock, usual, len(link) - i - 1, rest, i * compute - clock)
        coarsest, patience = nbytes(SCANS[0][0]), budget.patience()
        if budget.hopeless(coarsest):
            return End(clock + rest, kl / len(link))
        assert patience is not None
        if coarsest / now > patience:
            return End(clock + patience + rest, kl / len(link))
        clock, read, spent = clock + coarsest / now, read + coarsest, spent + coarsest / now
        best = 0
        for k in (1, 2):
            step, upto = nbytes(SCANS[k][0] - SCANS[k - 1][0]), nbytes(SCANS[k][0])
            budget = budget._replace(
                time_left=end - clock, s_per_byte=spent / read, lead=i * compute - clock
            )
            if not budget.finer(step, upto, 1 / now):
                break
            clock, read, spent = clock + step / now, read + step, spent + step / now
            best = k
        kl += SCANS[best][1]
    return End(clock, kl / len(link))


def links(chunks: int, count: int = 400) -> list[list[float]]:
    make = random.Random(chunks)
    return [[make.uniform(0.1e9, 10e9) / 8 for _ in range(chunks)] for _ in range(count)]


@pytest.mark.parametrize("compute", [0.2, 0.4])
@pytest.mark.parametrize("goal", [0.5, 1.0, 2.0, 3.0, 4.0, 6.0])
@pytest.mark.parametrize("chunks", [10, 30])
def test_more_requests_end_in_time_than_by_the_published_rule(
    chunks: int, goal: float, compute: float
) -> None:
    theirs = [published(link, goal, compute) for link in links(chunks)]
    mine = [ours(link, goal, compute) for link in links(chunks)]
    late, later = (sum(e.seconds > goal * 1.0001 for e in es) for es in (mine, theirs))
    assert late <= later
    assert sum(e.seconds for e in mine) <= sum(e.seconds for e in theirs)
    assert all(e.seconds <= (chunks + 1.01) * compute for e in mine), "later than without a cache"
    assert all(e.kl <= SCANS[0][1] + 1e-9 for e in mine)


@pytest.mark.parametrize(("chunks", "goal"), [(10, 6.0), (10, 8.0), (30, 20.0)])
def test_with_time_enough_it_is_finer_as_well(chunks: int, goal: float) -> None:
    theirs = [published(link, goal, 0.2) for link in links(chunks)]
    mine = [ours(link, goal, 0.2) for link in links(chunks)]
    assert sum(e.kl for e in mine) <= sum(e.kl for e in theirs)
    assert not any(e.seconds > goal for e in mine)


def test_a_link_that_dies_is_left_while_computing_still_ends_in_time() -> None:
    link = [5e9 / 8] * 3 + [1e6] * 7
    assert ours(link, 3.0, 0.2).seconds <= 3.0
    assert published(link, 3.0, 0.2).seconds > 10 * 3.0


def test_more_time_is_never_coarser() -> None:
    for link in links(10, 50):
        ends = [ours(link, goal, 1e9) for goal in (0.5, 1, 2, 4, 8, 16)]
        assert [e.kl for e in ends] == sorted((e.kl for e in ends), reverse=True)


def test_what_is_not_known_decides_nothing() -> None:
    budget = ScanBudget(time_left=1.0, s_per_byte=0.0, remaining_ratio=3)
    assert not budget.hopeless(1 << 40)
    assert budget.patience() is None
    assert budget.finer(100, 200, now=1e-3)
    assert not budget.finer(500, 600, now=1e-3)


def test_who_is_behind_computing_by_a_group_stops_reading() -> None:
    budget = ScanBudget(time_left=1.0, s_per_byte=1e-9, remaining_ratio=1, compute=2.0, lead=-0.9)
    assert not budget.hopeless(1000)
    assert budget.patience() == pytest.approx(0.1)
    assert budget._replace(lead=-1.1).hopeless(1000)
