"""Frequency tables, and the rule by which symbols are cut into streams."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tierloom.triton_kernels.rans.format import StreamGrid
from tierloom.triton_kernels.rans.tables import UNCODABLE, RansTables, normalize


@pytest.mark.parametrize(
    ("counts", "freq"),
    [
        ([1, 1], [512, 512]),
        ([1, 1, 1], [342, 341, 341]),
        ([0, 0, 0, 0], [256, 256, 256, 256]),
        ([5], [1024]),
        ([0, 1], [1, 1023]),
        ([1, 10**6, 3], [1, 1022, 1]),
        ([2**63 - 1, 2**62, 0], [682, 341, 1]),
        ([3, 1, 4, 1, 5, 9, 2, 6], [99, 33, 132, 33, 165, 298, 66, 198]),
    ],
)
def test_frequencies_are_these_on_every_machine(counts: list[int], freq: list[int]) -> None:
    got = normalize(np.array([counts]), 10)
    assert got.dtype == np.uint16
    assert got.tolist() == [freq]


@settings(deadline=None, max_examples=300)
@given(
    counts=st.lists(st.integers(0, 2**50) | st.integers(0, 40), min_size=1, max_size=256),
    bits=st.sampled_from([10, 11, 12]),
    floor=st.sampled_from([0, 1]),
)
def test_rows_add_up_and_keep_their_order(counts: list[int], bits: int, floor: int) -> None:
    if not any(counts) and not floor:
        counts[0] = 1
    freq = normalize(np.array([counts]), bits, floor)[0]
    assert freq.sum() == 1 << bits
    assert freq.min() >= floor
    assert freq[np.array(counts) == 0].max(initial=0) <= (1 if any(counts) else 1 << bits)
    shown = [min(c, 2**40) for c in counts]  # what is beyond the head room may tie
    order = np.argsort(shown, kind="stable")
    for a, b in pairwise(order):
        assert freq[a] <= freq[b] or shown[a] == shown[b]
    assert (RansTables.of(freq[None], bits).freq_cdf[0] & 0xFFFF == freq).all()


def test_normalised_tables_code_nearly_as_well_as_exact_ones() -> None:
    rng = np.random.default_rng(0)
    for bits in (10, 11, 12):
        width = rng.uniform(0.5, 8, 40)[:, None]
        share = np.exp(-0.5 * ((np.arange(31) - 15) / width) ** 2) + 1e-6
        share /= share.sum(axis=1, keepdims=True)
        freq = normalize((share * 1e9).astype(np.int64), bits) / (1 << bits)
        excess = (share * np.log2(share / freq)).sum(axis=1)
        assert excess.min() >= 0
        assert excess.max() < np.log2(1 / (1 - 31 / (1 << bits)))  # what the floor may take
        assert excess.mean() < 10 / (1 << bits)


def test_a_floor_of_0_leaves_symbols_out() -> None:
    counts = np.array([[0, 7, 0, 1], [0, 0, 0, 0]])
    floor = np.array([[0, 0, 0, 0], [0, 1, 0, 0]])
    assert normalize(counts, 10, floor).tolist() == [[0, 896, 0, 128], [0, 1024, 0, 0]]


@pytest.mark.parametrize(
    ("counts", "floor", "match"),
    [
        (np.zeros((1, 4)), 1, "integers"),
        (np.array([[1, -1]]), 1, "integers"),
        (np.array([1, 2]), 1, "integers"),
        (np.ones((1, 1025), int), 1, "do not fit"),
        (np.zeros((1, 3), int), 0, "needs a symbol"),
    ],
)
def test_counts_that_make_no_table(counts: np.ndarray, floor: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        normalize(counts, 10, floor)


@pytest.mark.parametrize(
    ("freq", "bits", "match"),
    [
        ([[512, 511]], 10, "add up"),
        ([[1025, -1]], 10, "add up"),
        ([[1 << 62, 1 << 62, 1 << 62, (1 << 62) + 1024]], 10, "add up"),
        ([[512, 512]], 9, "bits"),
        ([[1 << 13]], 13, "bits"),
        ([512, 512], 10, "frequencies must be"),
        ([[512.0, 512.0]], 10, "frequencies must be"),
        ([[]], 10, "frequencies must be"),
        ([[4] * 256 + [0]], 10, "frequencies must be"),
        ([[1024]] * 257, 10, "frequencies must be"),
    ],
)
def test_frequencies_that_are_no_table(freq: list, bits: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RansTables.of(np.array(freq), bits)


def test_what_the_coders_read() -> None:
    freq = np.array([[0, 1000, 24], [1024, 0, 0]])
    tables = RansTables.of(freq, 10)
    assert len(tables) == 2
    assert tables.freq_cdf.tolist() == [[0, 1000, 24 | 1000 << 16], [1024, 1024 << 16, 1024 << 16]]
    assert tables.decode.tolist() == [[1] * 1000 + [2] * 24, [0] * 1024]
    mark = (tables.encode & UNCODABLE) != 0
    assert (~mark).sum() == 3
    assert not mark[[0, 0, 1], [1, 2, 0]].any()


@pytest.mark.parametrize("bits", [10, 11, 12])
def test_a_product_divides_with_one_correction(bits: int) -> None:
    """For every frequency, at the edges of its quotients and at random."""
    rng = np.random.default_rng(bits)
    freq = np.arange(1, (1 << bits) + 1, dtype=np.uint64)
    pairs = np.column_stack([freq, (1 << bits) - freq])
    inverse = np.concatenate(
        [RansTables.of(part, bits).encode[:, 0] for part in np.split(pairs, len(pairs) // 256)]
    ) >> np.uint64(32)
    most = (freq << np.uint64(32 - bits)) - np.uint64(1)
    for k in (
        most // freq,
        most // freq // 2,
        rng.integers(0, most // freq + np.uint64(1), dtype=np.uint64),
    ):
        for x in (k * freq, k * freq + freq - np.uint64(1), most):
            x = np.minimum(x, most)
            short = x // freq - (x * inverse >> np.uint64(32))
            assert (short <= 1).all()


@pytest.mark.parametrize(
    ("tokens", "channels", "lanes", "rounds", "groups"),
    [
        (256, 1024, 32, 4, 8),
        (256, 576, 32, 5, 4),
        (256, 192, 32, 6, 1),
        (256, 128, 32, 4, 1),
        (256, 64, 16, 4, 1),
        (256, 8, 8, 1, 1),
        (256, 1, 8, 1, 1),
        (1, 1024, 8, 128, 1),
        (32, 1024, 32, 32, 1),
        (512, 1024, 32, 2, 16),
        (4096, 1024, 32, 1, 32),
    ],
)
def test_the_rule_stays(tokens: int, channels: int, lanes: int, rounds: int, groups: int) -> None:
    grid = StreamGrid.of(3, tokens, channels)
    assert (grid.lanes, grid.rounds, grid.groups) == (lanes, rounds, groups)


@given(st.integers(64, 20_000))
def test_side_data_is_small(channels: int) -> None:
    grid = StreamGrid.of(1, 256, channels)
    assert 32 * grid.groups * (grid.lanes + 1) <= 0.034 * 256 * channels


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([10, 11, 12]))
def test_any_grid(tokens: int, channels: int, bits: int) -> None:
    grid = StreamGrid.of(7, tokens, channels)
    assert 0 < channels - (grid.groups - 1) * grid.lanes * grid.rounds <= grid.lanes * grid.rounds
    assert grid.most_words(bits) <= grid.streams * grid.stream_words(bits)
    lanes = np.arange(channels) // (grid.lanes * grid.rounds) * grid.lanes
    lanes += np.arange(channels) % (grid.lanes * grid.rounds) % grid.lanes
    symbols = np.bincount(lanes) * tokens
    assert grid.most_words(bits) == 7 * int((symbols * bits // 16).sum())


@pytest.mark.parametrize("shape", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1 << 16, 1 << 15)])
def test_shapes_that_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"nothing|2\^31"):
        StreamGrid.of(*shape)
