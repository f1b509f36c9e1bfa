"""Splitting floats: numba against plain torch, and Triton against numba, byte for byte.

The Triton tests run twice: under the interpreter, in a child process that this file starts, and on
a CUDA device.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreter import run_interpreted

from tierloom.triton_kernels.exponent import reference
from tierloom.triton_kernels.exponent.cpu import SHIFTS, count_tops, merge, rest_bytes, split
from tierloom.triton_kernels.exponent.triton import launch_merge, launch_split
from tierloom.triton_kernels.rans.clusters_cpu import cluster, count_columns

SIZES = [1, 15, 16, 17, 47, 48, 49, 63, 64, 65, 1000, 4096]
POISON = 0xA5


def case(n: int, shift: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Elements of every kind; the symbol of each top, and the top of each symbol."""
    rng = np.random.default_rng(n)
    x = rng.integers(0, 1 << 16, n).astype(np.uint16)
    tops = rng.permutation(1 << (16 - shift))[:256]
    symbol_of = np.full(1 << (16 - shift), 255, np.uint8)
    symbol_of[tops[:255]] = np.arange(255)
    x[: n // 2] = (tops[rng.integers(0, 255, n // 2)] << shift) | (x[: n // 2] & (1 << shift) - 1)
    return x, symbol_of, tops.astype(np.uint16)


def by_numba(n: int, shift: int) -> dict[str, bytes]:
    x, symbol_of, top_of = case(n, shift)
    symbols = np.full(n, POISON, np.uint8)
    rest = np.full(rest_bytes(n, shift), POISON, np.uint8)
    split(x, shift, symbol_of, symbols, rest)
    back = np.full(n, POISON, np.uint16)
    merge(symbols, rest, shift, top_of, back)
    return {"symbols": symbols.tobytes(), "rest": rest.tobytes(), "back": back.tobytes()}


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("n", SIZES)
def test_numba_as_plain_torch(n: int, shift: int) -> None:
    x, symbol_of, top_of = case(n, shift)
    found = by_numba(n, shift)
    bits = torch.from_numpy(x.view(np.int16))
    symbols, rest = reference.split(bits, shift, torch.from_numpy(symbol_of))
    assert found["symbols"] == symbols.numpy().tobytes()
    assert found["rest"] == rest.numpy().tobytes()
    back = reference.merge(symbols, rest, shift, torch.from_numpy(top_of.astype(np.int32)))
    assert found["back"] == back.numpy().tobytes()
    known = symbol_of[x >> shift] != 255
    assert np.array_equal(np.frombuffer(found["back"], np.uint16)[known], x[known])


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("elements", [None, 16])
def test_triton_as_numba(n: int, shift: int, elements: int | None, device: str) -> None:
    x, symbol_of, top_of = case(n, shift)
    bits = torch.from_numpy(x.view(np.int16)).to(device)
    table = torch.from_numpy(symbol_of).to(device)
    symbols = torch.full((n,), POISON, dtype=torch.uint8, device=device)
    rest = torch.full((rest_bytes(n, shift),), POISON, dtype=torch.uint8, device=device)
    launch_split(bits, shift, table, symbols, rest, elements=elements)
    back = torch.full((n,), -1, dtype=torch.int16, device=device)
    tops = torch.from_numpy(top_of.view(np.int16)).to(device)
    launch_merge(symbols, rest, shift, tops, back, elements=elements)
    made = {"symbols": symbols, "rest": rest, "back": back}
    expected = by_numba(n, shift)
    different = [k for k, t in made.items() if t.cpu().numpy().tobytes() != expected[k]]
    assert not different


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("n", [0, 3, 4, 1001])
def test_tops_are_counted(n: int, shift: int) -> None:
    x, _, _ = case(n, shift)
    counts = np.zeros(1 << (16 - shift), np.int64)
    count_tops(x, shift, counts)
    assert np.array_equal(counts, np.bincount(x >> shift, minlength=len(counts)))


def test_columns_with_like_symbols_share_a_table() -> None:
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 4, (3, 20))
    symbols = (kind[:, None] * 10 + rng.integers(0, 6, (3, 50, 20))).astype(np.uint8)
    counts = np.zeros((3, 20, 36), np.uint32)
    count_columns(symbols, counts)
    assert (counts.sum(2) == 50).all()
    choice, tables = np.empty(60, np.uint8), np.empty((4, 36), np.int64)
    cluster(counts.reshape(60, 36), 5, choice, tables)
    assert tables.sum() == symbols.size
    groups = {(k, c) for k, c in zip(kind.reshape(-1), choice, strict=True)}
    assert len(groups) == 4
    for k in range(4):
        assert np.array_equal(tables[k], counts.reshape(60, 36)[choice == k].sum(0))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_under_the_interpreter() -> None:
    run_interpreted(__file__, least=40)
