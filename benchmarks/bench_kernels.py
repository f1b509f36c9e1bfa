"""Copies and checksums on a CPU, beside a flat memcpy of the same bytes in the same run.

    python -m pytest benchmarks/bench_kernels.py

A prompt's KV in shuffled blocks of 16 tokens: 256 MiB of Llama's (2,048 tokens), 180 MiB of
SmolLM2's (8,192). `NHD`: a block is one run of bytes; `HND`: a run per head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import xxhash
from cases import BLOCK, CHUNK, ITEMSIZE, SHAPES, slots
from yardstick import Memcpy, measure

from tierloom.triton_kernels.blend.cpu import scatter_turned_frames
from tierloom.triton_kernels.blend.turns import TurnTable
from tierloom.triton_kernels.checksum.xxh3_cpu import xxh3_64
from tierloom.triton_kernels.memory.tables import FrameTable, PlaneTable
from tierloom.triton_kernels.paged_copy.cpu import gather_frames, scatter_frames

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

GO = np.zeros(1, np.uint8)
ROUNDS = 7


@dataclass(frozen=True)
class Work:
    """Some prompt's KV, in shuffled blocks of a paged cache, and as many bytes of frames."""

    caches: list[torch.Tensor]
    planes: PlaneTable
    frames: FrameTable
    slots: np.ndarray
    stored: np.ndarray


TOKENS = {"8B": 2048, "SmolLM2": 8192}


@pytest.fixture(scope="module", params=["8B NHD", "8B HND", "SmolLM2 NHD"])
def work(request: pytest.FixtureRequest) -> Work:
    model, order = request.param.split()
    kv, tokens = SHAPES[model], TOKENS[model]
    layers, heads, dim, group = kv.layers, kv.heads, kv.dim, kv.group
    blocks = tokens // BLOCK + 8
    shape = (blocks, BLOCK, heads, dim) if order == "NHD" else (blocks, heads, BLOCK, dim)
    caches = [torch.randint(0, 999, shape, dtype=torch.int16) for _ in range(2 * layers)]
    views = caches if order == "NHD" else [cache.transpose(1, 2) for cache in caches]
    planes = PlaneTable(
        base=np.array([cache.data_ptr() for cache in caches], np.int64),
        stride=np.array([view.stride() for view in views], np.int64) * ITEMSIZE,
        kv=2,
        block_tokens=BLOCK,
        heads=heads,
        dim=dim,
        itemsize=ITEMSIZE,
    )
    shuffled = np.random.default_rng(0).permutation(blocks)[: tokens // BLOCK]
    starts = range(0, layers, group)
    count = tokens // CHUNK * len(starts)
    frame = 2 * group * CHUNK * planes.row_bytes
    arena = np.zeros(count * frame + 4096, np.uint8)
    stored = arena[-arena.ctypes.data % 4096 :][: count * frame]
    spans = [(layer, layer + group) for layer in starts]
    frames = FrameTable(
        address=stored.ctypes.data + np.arange(count, dtype=np.int64) * frame,
        nbytes=np.full(count, frame, np.int64),
        layer=np.array(spans * (tokens // CHUNK), np.int32),
        rows=np.full(count, CHUNK, np.int32),
        take=np.full(count, CHUNK, np.int32),
        slot0=np.arange(count, dtype=np.int64) // len(starts) * CHUNK,
        checksum=np.zeros(count, np.uint64),
        status=np.zeros(count, np.uint8),
    )
    return Work(caches, planes, frames, slots(shuffled), stored)


def gather(work: Work, checksum: bool) -> None:
    gather_frames(work.planes, work.frames, work.slots, GO, checksum=checksum)


def scatter(work: Work, verify: bool) -> None:
    scatter_frames(work.planes, work.frames, work.slots, GO, verify=verify)


def scatter_turned(work: Work, dtype: str) -> None:
    """All of K by the same 1,000 tokens; V as it is."""
    half, layers = work.planes.dim // 2, work.planes.layers
    angles = 1000 * 1e4 ** -(np.arange(half) / half)[None, None]
    turn = TurnTable(
        np.zeros(len(work.frames), np.int32), np.zeros(layers, np.int32),
        np.cos(angles).astype("f4"), np.sin(angles).astype("f4"), 0, False, dtype,
    )  # fmt: skip
    scatter_turned_frames(work.planes, work.frames, work.slots, GO, turn, verify=False)


OPS = {
    "gather": partial(gather, checksum=False),
    "gather, checksum": partial(gather, checksum=True),
    "scatter": partial(scatter, verify=False),
    "scatter, verify": partial(scatter, verify=True),
    "scatter, bf16 K turned": partial(scatter_turned, dtype="bfloat16"),
    "scatter, fp16 K turned": partial(scatter_turned, dtype="float16"),
    "xxh3": lambda work: xxh3_64(work.stored.ctypes.data, work.stored.nbytes),
    "xxh3 of the library": lambda work: xxhash.xxh3_64_intdigest(work.stored),
}


@pytest.mark.parametrize("op", OPS)
def test_cpu(op: str, work: Work, memcpy: Memcpy, benchmark: BenchmarkFixture) -> None:
    gather(work, checksum=True)  # gives scatter something to verify
    OPS[op](work)  # compiles
    benchmark.group = f"kernels {benchmark.params['work']}"
    measure(
        benchmark, lambda _: OPS[op](work),
        nbytes=work.stored.nbytes, rounds=ROUNDS, memcpy=memcpy,
    )  # fmt: skip
