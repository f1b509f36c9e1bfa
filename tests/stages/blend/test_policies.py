"""Which tokens a blend computes: complete, headed, within what it may, and the same every time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tierloom.stages.blend.budget import BlendBudget, BlendOptions
from tierloom.stages.blend.policies import POLICIES, Amount, Patchwork, choose, stretches
from tierloom.stages.errors import ConfigError, InputError
from tierloom.stages.kv.text import Excerpt, Run
from tierloom.stages.options import parse_share


def run(start: int, tokens: int, *, seam: bool = True) -> Run:
    return Run((Excerpt(start, tokens, bytes(32), 0, 0),), seam)


@st.composite
def patchworks(draw: st.DrawFn) -> Patchwork:
    """Runs with gaps of any length between, behind an exact prefix of any length."""
    exact = at = draw(st.integers(0, 40))
    runs = []
    for gap, tokens, seam in draw(
        st.lists(st.tuples(st.integers(0, 9), st.integers(1, 70), st.booleans()), max_size=6)
    ):
        runs.append(run(at + gap, tokens, seam=seam))
        at += gap + tokens
    return Patchwork(at + draw(st.integers(0, 9)), exact, runs)


amounts = st.builds(
    Amount, st.integers(0, 20), st.floats(0, 1), st.floats(0, 1), st.sampled_from([1, 16, math.inf])
)


@given(patchworks(), amounts, st.sampled_from(sorted(POLICIES)), st.randoms(use_true_random=False))
def test_every_policy(work: Patchwork, amount: Amount, name: str, random) -> None:
    scores = np.array(
        [random.choice([0.0, 1.0, random.random(), np.nan]) for _ in range(work.tokens)]
    )
    mask = choose(name, work, amount, scores)
    covered = work.covered()
    behind = np.arange(work.tokens) >= work.exact
    assert not mask[: work.exact].any()
    assert mask[~covered & behind].all()
    heads = np.zeros_like(mask)
    if POLICIES[name].headed:
        for r in work.runs:
            heads[r.start : min(r.end, r.start + amount.heads) if r.seam else r.start] = True
        heads &= covered
        assert mask[heads].all()
    by_score = int((mask & covered & ~heads).sum())
    if POLICIES[name].needs == "nothing":
        assert by_score == 0
    assert by_score <= amount.share * covered.sum() + 1e-6
    if by_score:
        assert by_score + heads.sum() <= amount.ceiling * covered.sum() + 1e-6
    assert np.array_equal(mask, choose(name, work, amount, scores.copy()))
    again = np.zeros_like(mask)
    for a, b in stretches(mask):
        assert a < b
        assert a == 0 or not mask[a - 1]
        again[a:b] = True
    assert np.array_equal(mask, again)


def test_the_highest_scores_are_taken() -> None:
    work = Patchwork(120, 20, [run(20, 50), run(70, 50, seam=False)])
    scores = np.zeros(120)
    scores[[5, 21, 60, 61, 100]] = [9, 8, 3, 2, 7]
    mask = choose("probe", work, Amount(4, 0.03), scores)
    assert stretches(mask) == [(20, 24), (60, 62), (100, 101)]
    assert stretches(choose("heads", work, Amount(4, 0.03))) == [(20, 24)]
    assert stretches(choose("deviation", work, Amount(4, 0.02), scores)) == [(21, 22), (100, 101)]
    # of two that are attended to alike, the one nearer to the seam is stranger here
    scores[[90, 91, 92]] = scores[30] = 10
    assert stretches(choose("probe", work, Amount(4, 0.01), scores)) == [(20, 24), (30, 31)]
    scores[60] = np.nan
    assert not choose("probe", work, Amount(4, 0.02), scores)[60]


def test_what_cannot_be_chosen_from_is_refused() -> None:
    work = Patchwork(100, 20, [run(20, 50)])
    with pytest.raises(InputError, match="needs scores"):
        choose("probe", work, Amount(8, 0.07))
    with pytest.raises(InputError, match="needs deviations"):
        choose("deviation", work, Amount(8, 0.07), np.zeros(99))
    with pytest.raises(ConfigError, match="probes"):
        choose("probes", work, Amount(8, 0.07))
    for wrong in ([run(10, 20)], [run(20, 10), run(29, 4)], [run(90, 11)]):
        with pytest.raises(InputError, match="overlap"):
            choose("none", Patchwork(100, 20, wrong), Amount(8, 0.07))


@pytest.mark.parametrize(("text", "share"), [("7 %", 0.07), ("12%", 0.12), (0.07, 0.07), ("1", 1)])
def test_a_share(text, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("wrong", ["7", "-1 %", "101 %", True, None, "7 percent", float("nan")])
def test_no_share(wrong) -> None:
    with pytest.raises(ValueError, match="7 %"):
        parse_share(wrong)


@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=50))
def test_the_share_stays_between_its_bounds(times: list[tuple[float, float]]) -> None:
    budget = BlendBudget(BlendOptions(adapt=True))
    for computing, loading in times:
        budget.measured(computing, loading)
        assert 0.02 <= budget.share <= 0.12


def test_the_slower_one_gets_less_to_do() -> None:
    options = BlendOptions(adapt=True)
    busy, idle = BlendBudget(options), BlendBudget(options)
    for _ in range(40):
        busy.measured(computing=2.0, loading=1.0)
        idle.measured(computing=1.0, loading=2.0)
    assert busy.amount().share == pytest.approx(options.floor, abs=1e-4)
    assert idle.amount().share == pytest.approx(options.ceiling, abs=1e-4)


def test_the_share_is_what_was_asked_for() -> None:
    """Else the same prompt would be answered otherwise when the machine is busy."""
    budget = BlendBudget(BlendOptions())
    budget.measured(computing=2.0, loading=1.0)
    assert budget.share == BlendOptions().share
    with pytest.raises(ValueError, match="floor <= share <= ceiling"):
        BlendOptions(adapt=True, ceiling=0.05)


def test_whether_a_blend_is_worth_while() -> None:
    work = Patchwork(1100, 100, [run(100, 500), run(600, 500)])
    auto = BlendBudget(BlendOptions())
    assert auto.worth_blending(work, 1000, exact=0.1, blend=0.2)
    assert not auto.worth_blending(work, 1000, exact=0.1, blend=1.2)  # the prefix alone is quicker
    assert not auto.worth_blending(work, 1000, exact=5.0, blend=1.1)  # so is computing everything
    assert auto.worth_blending(work, None, exact=None, blend=None)
    assert not auto.worth_blending(Patchwork(200, 100, [run(100, 63)]), 1, 1, 1)
    assert not auto.worth_blending(Patchwork(200, 200, []), None, None, None)
    assert BlendBudget(BlendOptions(worth="always")).worth_blending(work, 1000, 0.1, 1.2)
    assert not BlendBudget(BlendOptions(worth="never")).worth_blending(work, 1000, 0.1, 0.2)
