"""Frames placed with their K turned, Triton against the numba twin byte for byte; and what the last
tokens attend to, against attention in float64.

Each test runs twice: under Triton's interpreter, in a child process, and on a CUDA device.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from interpreter import run_interpreted
from paged_cases import LAYOUTS, Cache, make_cache, make_frames, make_slots
from test_blend_cpu import DTYPES, GO, GROUPS, ROWS, SMALL, TAKE, kept, table

from tierloom.triton_kernels.blend import reference
from tierloom.triton_kernels.blend.cpu import scatter_turned_frames
from tierloom.triton_kernels.blend.probe_cpu import probe_scores
from tierloom.triton_kernels.blend.probe_triton import launch_probe_scores
from tierloom.triton_kernels.blend.triton import DeviceTurns, launch_scatter_turned
from tierloom.triton_kernels.blend.turns import TurnTable
from tierloom.triton_kernels.paged_copy.cpu import gather_frames
from tierloom.triton_kernels.paged_copy.triton import DeviceFrames, DevicePlanes


def check(
    device: str, layout: str, dtype: torch.dtype, turn: TurnTable, elements: int | None = None,
    seed: int | None = None,
) -> None:  # fmt: skip
    """`seed`: frames hold any bits."""
    frames, slots, _ = kept(layout, dtype)
    there = make_cache(layout, **SMALL, dtype=dtype, device=device)  # type: ignore[arg-type]
    wanted = make_cache(layout, **SMALL, dtype=dtype)  # type: ignore[arg-type]
    if seed is not None:
        source = make_cache(layout, **SMALL, dtype=dtype, seed=seed)  # type: ignore[arg-type]
        gather_frames(source.table, frames.table, slots, GO)
    scatter_turned_frames(wanted.table, frames.table, slots, GO, turn)
    same = make_frames(there.table, GROUPS, ROWS, TAKE, device=device)
    for f in range(len(GROUPS)):
        same.fill(f, frames.content(f))
    launch_scatter_turned(
        DevicePlanes.of(there.table, device), DeviceFrames.of(same.table, device),
        torch.from_numpy(slots).to(device), DeviceTurns.of(turn, there.table, device),
        elements=elements,
    )  # fmt: skip
    assert there.bytes == wanted.bytes


@pytest.mark.parametrize(
    ("layout", "interleaved"), [*((name, False) for name in LAYOUTS), ("pairs HND", True)]
)
def test_layouts(device: str, layout: str, interleaved: bool) -> None:
    check(device, layout, torch.bfloat16, table(torch.bfloat16, [7, -3], interleaved=interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_in_small_tiles(device: str, dtype: torch.dtype, interleaved: bool) -> None:
    turn = table(dtype, [700, -31], interleaved=interleaved)
    check(device, "pairs HND", dtype, turn, elements=64)


@pytest.mark.parametrize(
    ("half", "first", "interleaved"),
    [(4, 0, True), (3, 2, False), (3, 2, True), (4, 16, False), (1, 21, True), (0, 0, False)],
)
@pytest.mark.parametrize("layout", ["MLA", "concatenated, K transposed"])
def test_heads_turned_in_part(
    device: str, layout: str, half: int, first: int, interleaved: bool
) -> None:
    turn = table(torch.float16, [5, -9], half=half, first=first, interleaved=interleaved)
    check(device, layout, torch.float16, turn)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_turned_by_nothing_is_a_plain_copy(device: str, dtype: torch.dtype) -> None:
    """Of any bits: NaN with a payload, infinity, denormals."""
    check(device, "pairs HND", dtype, table(dtype, [0, 0]), seed=8)


def test_turns_of_another_model_are_refused() -> None:
    cache = make_cache("pairs NHD", **SMALL, dtype=torch.bfloat16)  # type: ignore[arg-type]
    turn = replace(table(torch.bfloat16, [5, 9]), first=1)
    with pytest.raises(ValueError, match="channels 1 to 25"):
        DeviceTurns.of(turn, cache.table, "cpu")


PROBED = {"layers": 2, "blocks": 12, "block_tokens": 4, "heads": 2, "dim": 24}
LAYER, TOKENS, CONTEXT, SCALE = 1, 40, 35, 24**-0.5
POSITIONS = torch.tensor([36, 37, 38, 39, 3])
"""The last sees some of the context only."""


def probed(layout: str, dtype: torch.dtype) -> tuple[Cache, np.ndarray, torch.Tensor, torch.Tensor]:
    """Random K with NaN where no token is, and what the scores are."""
    cache = make_cache(layout, **PROBED, dtype=dtype)  # type: ignore[arg-type]
    make = torch.Generator().manual_seed(1)
    slots = make_slots(TOKENS, 48, np.random.default_rng(0), "permuted")
    used, k = torch.from_numpy(slots.copy()), cache.views[LAYER]
    slots[[5, 20]] = -1
    queries = torch.randn(len(POSITIONS), 6, 24, generator=make).to(dtype) * 2
    keys = torch.randn(TOKENS, 2, 24, generator=make).to(dtype)
    k.fill_(torch.nan)
    k[used // 4, used % 4] = keys
    k[used[5] // 4, used[5] % 4] = torch.nan
    here = torch.from_numpy(slots >= 0)
    keys[5] = 0
    want = reference.paid_to(queries.double(), keys.double(), POSITIONS, here, CONTEXT, SCALE)
    assert want[5] == 0 < want[4]
    return cache, slots, queries, want.float()


KEY_LAYOUTS = ["pairs NHD", "pairs HND", "concatenated, K transposed"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", KEY_LAYOUTS)
def test_probe_on_a_cpu(layout: str, dtype: torch.dtype) -> None:
    cache, slots, queries, want = probed(layout, dtype)
    got = probe_scores(cache.table, LAYER, slots, queries, POSITIONS, CONTEXT, scale=SCALE)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("keys", [16, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", KEY_LAYOUTS)
def test_probe(device: str, layout: str, dtype: torch.dtype, keys: int | None) -> None:
    cache, slots, queries, want = probed(layout, dtype)
    there = make_cache(layout, **PROBED, dtype=dtype, device=device)  # type: ignore[arg-type]
    for view, mine in zip(there.views, cache.views, strict=True):
        view.copy_(mine)
    got = launch_probe_scores(
        DevicePlanes.of(there.table, device), LAYER, torch.from_numpy(slots).to(device),
        queries.to(device), POSITIONS.to(device), CONTEXT, scale=SCALE, keys=keys,
    )  # fmt: skip
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_under_the_interpreter() -> None:
    run_interpreted(__file__, least=50)
