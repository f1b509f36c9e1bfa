"""The Triton kernels against the reference and the numba twins, byte for byte.

Each test runs twice: under Triton's interpreter, in a child process, and on a CUDA device.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreter import run_interpreted
from paged_cases import LAYOUTS, NATIVE, make_cache, make_frames, make_slots

from tierloom.triton_kernels.memory.launch import Tile
from tierloom.triton_kernels.memory.tables import PlaneTable
from tierloom.triton_kernels.paged_copy import reference
from tierloom.triton_kernels.paged_copy.cpu import gather_frames, scatter_frames
from tierloom.triton_kernels.paged_copy.triton import DeviceFrames, DevicePlanes, launch_paged_copy

GO = np.zeros(1, np.uint8)
GROUPS, ROWS, TAKE = [(0, 2), (1, 2)], [9, 5], [9, 3]
TILE = Tile(rows=4, nbytes=64, warps=4)
"""Smaller than any case, so that rows and row bytes both need several tiles."""
SHAPE = {"layers": 2, "blocks": 6, "block_tokens": 4, "heads": 2, "dim": 24}


def check_round_trip(device: str, layout: str, tile: Tile | None, **shape: object) -> None:
    """Device gather as CPU gather and reference; device scatter as reference."""
    rng = np.random.default_rng(2)
    make = {**SHAPE, "dtype": torch.bfloat16, **shape}
    here = make_cache(layout, **make, seed=4)  # type: ignore[arg-type]
    there = make_cache(layout, **make, seed=4, device=device)  # type: ignore[arg-type]
    slots = make_slots(sum(TAKE), SHAPE["blocks"] * SHAPE["block_tokens"], rng, "holes")
    on_device = torch.from_numpy(slots).to(device)
    planes = DevicePlanes.of(there.table, device)

    expected = make_frames(here.table, GROUPS, ROWS, TAKE)
    gather_frames(here.table, expected.table, slots, GO)
    frames = make_frames(there.table, GROUPS, ROWS, TAKE, device=device)
    table = DeviceFrames.of(frames.table, device)
    launch_paged_copy(planes, table, on_device, gather=True, tile=tile)
    assert there.bytes == here.bytes
    assert frames.guards_hold()
    for f in range(2):
        mine = slots[sum(TAKE[:f]) :][: TAKE[f]].tolist()
        want = reference.gather(here.views, here.kv, range(*GROUPS[f]), mine, ROWS[f])
        assert frames.content(f) == want.contiguous().view(torch.uint8).numpy().tobytes()
        assert frames.content(f) == expected.content(f)

    target = make_cache(layout, **make, device=device)  # type: ignore[arg-type]
    wanted = make_cache(layout, **make)  # type: ignore[arg-type]
    planes = DevicePlanes.of(target.table, device)
    launch_paged_copy(planes, table, on_device, gather=False, tile=tile)
    scatter_frames(wanted.table, expected.table, slots, GO)
    assert target.bytes == wanted.bytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: str, layout: str) -> None:
    check_round_trip(device, layout, TILE)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
def test_dtypes(device: str, dtype: torch.dtype) -> None:
    check_round_trip(device, "concatenated, K transposed", TILE, dtype=dtype)


@pytest.mark.parametrize("layout", ["pairs NHD", "pairs HND", "MLA"])
def test_rows_of_odd_sizes(device: str, layout: str) -> None:
    check_round_trip(device, layout, TILE, dim=7, heads=3, dtype=torch.uint8)


@pytest.mark.parametrize(
    "layout", ["pairs NHD", "pairs HND", "concatenated, K transposed", *NATIVE]
)
def test_tiles_that_the_launcher_chooses(device: str, layout: str) -> None:
    check_round_trip(device, layout, None)


def test_planes_of_both_widths_share_a_launch() -> None:
    cache = make_cache("concatenated, K transposed", **SHAPE, dtype=torch.bfloat16)
    planes = DevicePlanes.of(cache.table, "cpu")
    assert planes.has_wide
    assert planes.has_narrow


def test_contiguous_heads_become_one() -> None:
    planes = DevicePlanes.of(make_cache("MLA", **SHAPE, dtype=torch.bfloat16).table, "cpu")
    assert (planes.heads, planes.dim) == (1, 24)
    nhd = make_cache("pairs NHD", **SHAPE, dtype=torch.bfloat16)
    planes = DevicePlanes.of(nhd.table, "cpu")
    assert (planes.heads, planes.dim, planes.has_wide, planes.has_narrow) == (1, 48, True, False)


def test_frames_off_16_bytes_are_refused() -> None:
    cache = make_cache("pairs NHD", **SHAPE, dtype=torch.bfloat16)
    frames = make_frames(cache.table, [(0, 1)], [4], [4], shift=8)
    with pytest.raises(ValueError, match="multiple of 16"):
        DeviceFrames.of(frames.table, "cpu")


def test_whole_blocks(device: str) -> None:
    cache = make_cache("block-first NHD", **SHAPE, dtype=torch.bfloat16, seed=9, device=device)
    block_bytes = 4 * 2 * 24 * 2
    table = PlaneTable.of_blocks(cache.table.base, 2 * block_bytes, block_bytes, kv=2)
    ids = torch.tensor([5, -1, 0, 3])
    frames = make_frames(table, [(0, 2)], [4], [4], device=device)
    on_device = DeviceFrames.of(frames.table, device)
    planes = DevicePlanes.of(table, device)
    launch_paged_copy(planes, on_device, ids.to(device), gather=True, tile=TILE)
    expected = torch.stack([view[ids.to(device)] for view in cache.views])
    expected[:, 1] = 0
    assert frames.content(0) == expected.cpu().view(torch.uint8).numpy().tobytes()


def test_no_frames(device: str) -> None:
    cache = make_cache("pairs NHD", **SHAPE, dtype=torch.bfloat16, device=device)
    frames = make_frames(cache.table, [(0, 1)], [4], [4]).table
    none = DeviceFrames(torch.empty(0, 6, dtype=torch.int64, device=device), 0, 0)
    before = cache.bytes
    slots = torch.arange(0, device=device)
    launch_paged_copy(DevicePlanes.of(cache.table, device), none, slots, gather=False)
    assert cache.bytes == before
    assert len(frames) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_under_the_interpreter() -> None:
    run_interpreted(__file__, least=25)
