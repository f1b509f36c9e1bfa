"""Kernels on a GPU, beside a copy of the same bytes on the same GPU; skipped where there is none.

    python -m pytest benchmarks/bench_kernels_gpu.py

2,048 tokens of Llama-3.1-8B in shuffled blocks of 16: 256 MiB of KV. Times are the GPU's own, by
events around each launch; GB are of KV, so a kernel that writes symbols moves half as many bytes
again as it counts, and a copy twice as many.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from cases import BLOCK, CHUNK, ITEMSIZE, SHAPES, slots

from tierloom.triton_kernels.cachegen.cpu import turns
from tierloom.triton_kernels.cachegen.triton import (
    CodeTables,
    Sites,
    launch_decode,
    launch_encode,
    launch_moments,
)
from tierloom.triton_kernels.memory.tables import FrameTable, PlaneTable
from tierloom.triton_kernels.paged_copy.triton import DeviceFrames, DevicePlanes, launch_paged_copy

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS, ROUNDS = 2048, 20


@dataclass(frozen=True)
class Work:
    """A prompt's KV in a paged cache on `device`, and what each kernel does with it."""

    caches: list[torch.Tensor]
    stored: torch.Tensor
    ops: dict[str, Callable[[], None]]
    bad: torch.Tensor
    """int32 [frames], 0 if all went well."""


def make_work(device: str, tokens: int, chunk: int, layers: int, group: int) -> Work:
    heads, dim = SHAPES["8B"].heads, SHAPES["8B"].dim
    blocks, channels = tokens // BLOCK + 8, heads * dim
    shape = (blocks, BLOCK, heads, dim)
    caches = [torch.randn(shape, device=device).bfloat16() for _ in range(2 * layers)]
    stride = np.tile(np.array(caches[0].stride(), np.int64) * ITEMSIZE, (2 * layers, 1))
    base = np.array([cache.data_ptr() for cache in caches], np.int64)
    planes = DevicePlanes.of(PlaneTable(base, stride, 2, BLOCK, heads, dim, ITEMSIZE), device)
    shuffled = np.random.default_rng(0).permutation(blocks)[: tokens // BLOCK]
    rows = torch.from_numpy(slots(shuffled)).to(device)

    starts = range(0, layers, group)
    count, elements = tokens // chunk * len(starts), 2 * group * chunk * channels
    stored = torch.zeros(count * elements * ITEMSIZE, dtype=torch.uint8, device=device)
    columns = {
        "nbytes": np.zeros(count, np.int64),
        "layer": np.array([(at, at + group) for at in starts] * (tokens // chunk), np.int32),
        "rows": np.full(count, chunk, np.int32), "take": np.full(count, chunk, np.int32),
        "slot0": np.arange(count, dtype=np.int64) // len(starts) * chunk,
        "checksum": np.zeros(count, np.uint64), "status": np.zeros(count, np.uint8),
    }  # fmt: skip
    place = np.arange(count, dtype=np.int64) * elements
    raw, symbols = (
        DeviceFrames.of(FrameTable(address=stored.data_ptr() + place * size, **columns), device)
        for size in (ITEMSIZE, 1)
    )

    freqs = (500000.0 ** -(np.arange(dim // 2) / (dim // 2))).astype(np.float32)
    cos, sin = (torch.from_numpy(t).to(device) for t in turns(0, tokens, freqs))
    first = columns["layer"][:, 0].astype(np.int64)
    none = np.zeros(count, np.int64)
    table = np.column_stack([columns["slot0"], first, first + layers, none, none])
    sites = Sites(torch.from_numpy(table).to(device), cos, sin, dim)
    means, steps = torch.zeros(2 * layers, channels), torch.full((2 * layers, channels), 0.25)
    scales = means.to(device), steps.to(device)
    double = torch.zeros(2, 2 * layers, channels, dtype=torch.float64, device=device)
    bad = torch.zeros(count, dtype=torch.int32, device=device)
    empty = torch.zeros(1, dtype=torch.int32, device=device)
    tables = CodeTables(
        torch.zeros(2 * layers, channels, dtype=torch.uint8, device=device),
        torch.full((1,), 127, dtype=torch.int32, device=device),
        empty.view(torch.uint32), empty, torch.zeros_like(bad),
    )  # fmt: skip
    coded = symbols, rows, sites, *scales, bad
    ops: dict[str, Callable[[], None]] = {
        "gather": lambda: launch_paged_copy(planes, raw, rows, gather=True),
        "scatter": lambda: launch_paged_copy(planes, raw, rows, gather=False),
        "cachegen moments": lambda: launch_moments(
            planes, symbols, rows, sites, *double, bad, kind="bfloat16"
        ),
        "cachegen encode": lambda: launch_encode(planes, *coded, kind="bfloat16", tables=tables),
        "cachegen decode": lambda: launch_decode(
            planes, *coded, tables.places, tables.values, kind="bfloat16"
        ),
    }
    return Work(caches, stored, ops, bad)


@pytest.fixture(scope="module")
def work() -> Work:
    kv = SHAPES["8B"]
    return make_work("cuda", TOKENS, CHUNK, kv.layers, kv.group)


def seconds(run: Callable[[], object]) -> float:
    """By the GPU's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


@pytest.mark.parametrize(
    "op", ["gather", "scatter", "cachegen moments", "cachegen encode", "cachegen decode"]
)
def test_gpu(op: str, work: Work, benchmark: BenchmarkFixture) -> None:
    nbytes = work.stored.nbytes
    flat, to = torch.zeros_like(work.stored), torch.zeros_like(work.stored)
    work.ops["gather" if op == "scatter" else "cachegen encode"]()  # something to place
    work.ops[op]()  # compiles
    copies, took = [], []

    def one() -> None:
        copies.append(seconds(lambda: to.copy_(flat)))
        took.append(seconds(work.ops[op]))

    benchmark.group = "kernels on a GPU"
    benchmark.pedantic(one, rounds=ROUNDS, iterations=1)
    assert not work.bad.any()
    for end, middle in (("", statistics.median), ("_best", min)):
        benchmark.extra_info["gb_per_s" + end] = round(nbytes / middle(took) / 1e9, 1)
        benchmark.extra_info["share_of_memcpy" + end] = round(middle(copies) / middle(took), 3)
