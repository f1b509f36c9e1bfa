"""cachegen's numba kernels against their reference, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tierloom.triton_kernels.cachegen import cpu, reference

BITS = {torch.bfloat16: np.uint16, torch.float16: np.int16, torch.float32: np.uint32}


def bits_of(x: torch.Tensor) -> Any:
    """As encoders have it: read-only bits."""
    made = np.frombuffer(x.contiguous().view(torch.uint8).numpy().tobytes(), BITS[x.dtype])
    return made.reshape(x.shape)


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize(
    ("first", "turned", "half"), [(0, 0, 0), (4, 2, 32), (1, 3, 16), (0, 4, 1)]
)
def test_there_and_back(dtype: torch.dtype, first: int, turned: int, half: int) -> None:
    make = torch.Generator().manual_seed(half)
    x = (torch.randn(4, 37, 192, generator=make) * 3).to(dtype)
    rng = np.random.default_rng(half)
    means = rng.normal(size=(4, 192)).astype(np.float32)
    steps = rng.uniform(0.002, 0.5, (4, 192)).astype(np.float32)
    steps[2, 5] = 0
    freqs = (10000.0 ** -(np.arange(half) / max(half, 1))).astype(np.float32)
    place = first, turned, *cpu.turns(512, 37, freqs), 64
    q = np.full((4, 37 - first, 192), 77, np.int16)
    assert cpu.quantize(bits_of(x), *place, means, steps, q)
    plain = x.float().numpy()
    wanted = reference.quantize_reference(plain, *place, means, steps)
    assert np.array_equal(q, wanted)

    reach = np.array([127, 9, 1], np.int32)
    tabid = rng.integers(0, 3, (4, 192)).astype(np.uint8)
    symbols, room = np.full(q.shape, 77, np.uint8), q.size
    places, values = np.empty(room, np.uint32), np.empty(room, np.int32)
    found = cpu.to_symbols(q, reach, tabid, symbols, places, values)
    for ours, theirs in zip(
        (symbols, places[:found], values[:found]),
        reference.symbols_reference(q, reach, tabid), strict=True,
    ):  # fmt: skip
        assert np.array_equal(ours, theirs)
    assert cpu.to_symbols(q, reach, tabid, symbols, places[:0], values[:0]) == found

    back = np.full(x.shape, 77, BITS[dtype])
    escapes = places[:found].copy(), values[:found].copy()
    assert cpu.dequantize(symbols, *place, means, steps, *escapes, back) == found
    exact = reference.dequantize_reference(q.astype(np.int32), *place, means, steps)
    assert (back[:, :first] == 77).all()
    assert np.array_equal(back[:, first:], bits_of(torch.from_numpy(exact).to(dtype)))


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_tokens_there_and_back(dtype: torch.dtype) -> None:
    """The rule of the paper."""
    make = torch.Generator().manual_seed(7)
    x = (torch.randn(4, 37, 192, generator=make) * 3).to(dtype)
    x[1, 5] = 0
    most = np.array([15, 7, 5, 1], np.int32)
    q, tops = np.full(x.shape, 77, np.int16), np.full(x.shape[:2], 77, BITS[dtype])
    assert cpu.quantize_tokens(bits_of(x), most, tops, q)
    wanted, largest = reference.quantize_tokens_reference(x.float().numpy(), most)
    assert np.array_equal(q, wanted)
    assert np.array_equal(tops, bits_of(torch.from_numpy(largest).to(dtype)))
    assert np.abs(q).max((1, 2)).tolist() == most.tolist()

    centers = np.rint(wanted.mean(1)).astype(np.int8)
    centers[2] = -9
    q -= centers[:, None]
    reach, tabid = np.array([127, 3], np.int32), np.zeros((4, 192), np.uint8)
    tabid[0, ::2] = 1
    symbols = np.full(q.shape, 77, np.uint8)
    places, values = np.empty(q.size, np.uint32), np.empty(q.size, np.int32)
    found = cpu.to_symbols(q, reach, tabid, symbols, places, values)
    back = np.full(x.shape, 77, BITS[dtype])
    escapes = places[:found].copy(), values[:found].copy()
    assert cpu.dequantize_tokens(symbols, centers, most, tops, *escapes, back) == found > 0
    exact = reference.dequantize_tokens_reference(wanted.astype(np.int32), most, largest)
    assert np.array_equal(back, bits_of(torch.from_numpy(exact).to(dtype)))
    tops[3, 36] = bits_of(torch.tensor([float("inf")], dtype=dtype))[0]
    assert cpu.dequantize_tokens(symbols, centers, most, tops, *escapes, back) == -1


def test_moments() -> None:
    x = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0)) + 100
    freqs = np.float32([0.5, 0.1])
    cos, sin = cpu.turns(7, 50, freqs)
    means, spreads = np.empty((2, 2, 64))
    assert cpu.moments(bits_of(x), 3, 1, cos, sin, 64, means, spreads)
    steps = np.full((2, 64), 2.0**-6, np.float32)
    q = reference.quantize_reference(x.numpy(), 3, 1, cos, sin, 64, 0 * steps, steps) * 2.0**-6
    np.testing.assert_allclose(means, q.mean(1), atol=2.0**-7)
    np.testing.assert_allclose(spreads, q.var(1), rtol=1e-4, atol=0.02)


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_around_the_means_and_back(dtype: torch.dtype) -> None:
    x = (torch.randn(3, 20, 64, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    means = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    freqs = (10000.0 ** -(np.arange(8) / 8)).astype(np.float32)
    place = 2, 1, *cpu.turns(50, 20, freqs), 32
    y = np.full((3, 18, 64), 77, np.float32)
    assert cpu.centered(bits_of(x), *place, means, y)
    one = np.ones_like(means)
    q = reference.quantize_reference(256 * x.float().numpy(), *place, 256 * means, one)
    np.testing.assert_allclose(y, q / 256, atol=2.0**-8)
    back = np.full(x.shape, 77, BITS[dtype])
    cpu.uncentered(y, *place, means, back)
    assert (back[:, :2] == 77).all()
    again = torch.from_numpy(back.view(np.int32 if dtype == torch.float32 else np.int16))
    torch.testing.assert_close(again.view(dtype)[:, 2:], x[:, 2:])
    broken = x.clone()
    broken[2, 19, 63] = float("nan")
    assert not cpu.centered(bits_of(broken), *place, means, y)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_what_cannot_be_rounded(bad: float) -> None:
    x = torch.zeros(1, 3, 64)
    x[0, 2, 63] = bad
    none = np.zeros((3, 0), np.float32)
    scales = np.zeros((1, 64), np.float32), np.ones((1, 64), np.float32)
    q = np.empty((1, 3, 64), np.int16)
    assert not cpu.quantize(bits_of(x), 0, 0, none, none, 64, *scales, q)
    if not np.isfinite(bad):
        most, tops = np.ones(1, np.int32), np.empty((1, 3), np.uint32)
        assert not cpu.quantize_tokens(bits_of(x), most, tops, q)


def test_the_cheapest_table_is_chosen() -> None:
    rng = np.random.default_rng(0)
    q = rng.integers(-200, 200, (2, 40, 33)).astype(np.int16)
    costs = rng.integers(0, 9000, (64, 256)).astype(np.int32)
    tabid = np.empty((2, 33), np.uint8)
    cpu.choose_tables(q, costs, tabid)
    total = costs[:, np.clip(q.astype(int) + 128, 0, 255)].sum(2)
    assert np.array_equal(tabid, total.argmin(0))
