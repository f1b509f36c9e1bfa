"""Frames placed with their K turned: Triton against the numba twin, byte for byte.

Each test runs twice: under Triton's interpreter, in a child process, and on a CUDA device.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interpreter import run_interpreted
from paged_cases import LAYOUTS, make_cache, make_frames
from test_blend_cpu import DTYPES, GO, GROUPS, ROWS, SMALL, TAKE, kept, table

from tierloom.triton_kernels.blend.cpu import scatter_turned_frames
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


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: str, layout: str, interleaved: bool) -> None:
    check(device, layout, torch.bfloat16, table(torch.bfloat16, [7, -3], interleaved=interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_in_small_tiles(device: str, dtype: torch.dtype, interleaved: bool) -> None:
    turn = table(dtype, [700, -31], interleaved=interleaved)
    check(device, "pairs HND", dtype, turn, elements=64)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("half", "first"), [(4, 0), (3, 2), (4, 16), (1, 21), (0, 0)])
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


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_under_the_interpreter() -> None:
    run_interpreted(__file__, least=50)
