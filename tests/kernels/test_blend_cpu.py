"""Frames placed with their K turned: numba against the reference, byte for byte."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from paged_cases import LAYOUTS, Cache, Frames, make_cache, make_frames, make_slots

from tierloom.triton_kernels.blend import reference
from tierloom.triton_kernels.blend.cpu import scatter_turned_frames
from tierloom.triton_kernels.blend.turns import TurnTable
from tierloom.triton_kernels.memory.tables import CORRUPT, PENDING, PLACED
from tierloom.triton_kernels.paged_copy import reference as paged
from tierloom.triton_kernels.paged_copy.cpu import gather_frames, scatter_frames

GO = np.zeros(1, np.uint8)
GROUPS, ROWS, TAKE = [(0, 2), (2, 3), (1, 3)], [9, 5, 6], [9, 3, 6]
SMALL = {"layers": 3, "blocks": 7, "block_tokens": 4, "heads": 3, "dim": 24}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROW_OF = [1, -1, 0]
"""Of each frame in the table of turns: the second is copied as it is."""


def table(dtype: torch.dtype, shifts: list[float], **how: object) -> TurnTable:
    """Turns of two kinds by `shifts`; layer 1 of 3 has no rotary embedding."""
    half = int(how.pop("half", 12))  # type: ignore[call-overload]
    freqs = np.array([[t ** -(i / half) for i in range(half)] for t in (1e4, 5e5)])
    angles = np.array(shifts)[:, None, None] * freqs
    parts = {"first": 0, "interleaved": False, "dtype": str(dtype).removeprefix("torch.")} | how
    return TurnTable(
        np.array(ROW_OF, np.int32), np.array([1, -1, 0], np.int32),
        np.cos(angles).astype("f4"), np.sin(angles).astype("f4"), **parts,
    )  # type: ignore[arg-type]  # fmt: skip


def noise(layout: str, dtype: torch.dtype) -> Cache:
    cache = make_cache(layout, **SMALL, dtype=dtype)  # type: ignore[arg-type]
    make = torch.Generator().manual_seed(3)
    for view in cache.views:
        view.copy_(torch.randn(view.shape, generator=make))
    return cache


def kept(layout: str, dtype: torch.dtype, order: str = "holes") -> tuple[Frames, np.ndarray, Cache]:
    source = noise(layout, dtype)
    slots = make_slots(sum(TAKE), 28, np.random.default_rng(1), order)
    frames = make_frames(source.table, GROUPS, ROWS, TAKE)
    gather_frames(source.table, frames.table, slots, GO)
    frames.table.status[:] = PENDING
    return frames, slots, source


def numbers(frames: Frames, f: int, like: Cache) -> torch.Tensor:
    first, (start, stop) = like.views[0], GROUPS[f]
    flat = torch.frombuffer(bytearray(frames.content(f)), dtype=first.dtype)
    return flat.view(like.kv, stop - start, ROWS[f], *first.shape[2:])


def check(layout: str, dtype: torch.dtype, turn: TurnTable, order: str = "holes") -> None:
    frames, slots, source = kept(layout, dtype, order)
    target, wanted = (make_cache(layout, **SMALL, dtype=dtype) for _ in range(2))  # type: ignore[arg-type]
    scatter_turned_frames(target.table, frames.table, slots, GO, turn)
    for f in range(3):
        mine = slots[sum(TAKE[:f]) :][: TAKE[f]].tolist()
        x = numbers(frames, f, source)
        reference.scatter_turned(wanted.views, x, range(*GROUPS[f]), mine, turn, ROW_OF[f])
    assert target.bytes == wanted.bytes
    assert frames.table.status.tolist() == [PLACED] * 3


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, interleaved: bool) -> None:
    check(layout, dtype, table(dtype, [700, -31], interleaved=interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("half", "first"), [(4, 0), (3, 2), (4, 16), (1, 22), (0, 0)])
@pytest.mark.parametrize("layout", ["pairs NHD", "MLA", "concatenated, K transposed"])
def test_heads_turned_in_part(layout: str, half: int, first: int, interleaved: bool) -> None:
    turn = table(torch.bfloat16, [5, -9], half=half, first=first, interleaved=interleaved)
    check(layout, torch.bfloat16, turn, "runs")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_turned_by_nothing_is_a_plain_copy(dtype: torch.dtype) -> None:
    """Of any bits: NaN with a payload, infinity, denormals."""
    source = make_cache("pairs HND", **SMALL, dtype=dtype, seed=8)  # type: ignore[arg-type]
    slots = make_slots(sum(TAKE), 28, np.random.default_rng(1), "holes")
    frames = make_frames(source.table, GROUPS, ROWS, TAKE)
    gather_frames(source.table, frames.table, slots, GO)
    target, wanted = (make_cache("pairs HND", **SMALL, dtype=dtype) for _ in range(2))  # type: ignore[arg-type]
    scatter_turned_frames(target.table, frames.table, slots, GO, table(dtype, [0, 0]))
    scatter_frames(wanted.table, frames.table, slots, GO)
    assert target.bytes == wanted.bytes


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_a_fresh_rotation(dtype: torch.dtype, interleaved: bool) -> None:
    """Within 2 units in the last place of what a float64 rotation to the new place gives, measured
    at the pair's length; and turned back it is what it was, within as much."""
    frames, slots, source = kept("pairs NHD", dtype, "permuted")
    turn = table(dtype, [700, -31], interleaved=interleaved)
    target, back = noise("pairs NHD", dtype), noise("pairs NHD", dtype)
    scatter_turned_frames(target.table, frames.table, slots, GO, turn)
    layer, mine = 0, slots[: TAKE[0]]  # frame 0, row 1 of the turns, kind 1
    old = paged.gather(source.views, 2, range(layer, layer + 1), mine.tolist(), TAKE[0])[0, 0]
    new = paged.gather(target.views, 2, range(layer, layer + 1), mine.tolist(), TAKE[0])[0, 0]
    fresh = old.double()
    angles = torch.from_numpy(-31 * np.array([5e5 ** -(i / 12) for i in range(12)]))
    reference.turn_pairs(fresh, angles.cos(), angles.sin(), 0, interleaved=interleaved)
    halves = (lambda x: (x[..., ::2], x[..., 1::2])) if interleaved else (lambda x: x.chunk(2, -1))
    length = torch.hypot(*halves(fresh))
    ulp = torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(length))
    for got, want in zip(halves(new.double()), halves(fresh), strict=True):
        assert ((got - want).abs() <= 2 * ulp).all()

    again = make_frames(source.table, GROUPS, ROWS, TAKE)
    gather_frames(target.table, again.table, slots, GO)
    there = replace(turn, sin=-turn.sin)
    scatter_turned_frames(back.table, again.table, slots, GO, there)
    home = paged.gather(back.views, 2, range(layer, layer + 1), mine.tolist(), TAKE[0])[0, 0]
    for got, want in zip(halves(home.double()), halves(old.double()), strict=True):
        assert ((got - want).abs() <= 2 * ulp).all()
    assert not torch.equal(new, old)


def test_a_row_that_nobody_wants_may_hold_nan() -> None:
    frames, slots, _ = kept("pairs NHD", torch.bfloat16, "permuted")
    target, wanted = (make_cache("pairs NHD", **SMALL, dtype=torch.bfloat16) for _ in range(2))  # type: ignore[arg-type]
    turn = table(torch.bfloat16, [5, 700])
    slots[4] = -1
    scatter_turned_frames(wanted.table, frames.table, slots, GO, turn)
    content = np.frombuffer(frames.content(0), np.uint16).reshape(2, 2, 9, 72).copy()
    content[:, :, 4] = 0x7FFF
    frames.fill(0, content.tobytes())
    scatter_turned_frames(target.table, frames.table, slots, GO, turn, verify=False)
    assert target.bytes == wanted.bytes


def test_a_corrupt_frame_places_nothing() -> None:
    frames, slots, _ = kept("pairs NHD", torch.bfloat16)
    bad = bytearray(frames.content(1))
    bad[-1] ^= 1
    frames.fill(1, bytes(bad))
    frames.table.layer[2] = 1, 2  # else frame 2 would write where frame 1 does
    frames.table.nbytes[2] //= 2
    frames.table.checksum[2] = 0
    target = make_cache("pairs NHD", **SMALL, dtype=torch.bfloat16)  # type: ignore[arg-type]
    clean = target.bytes
    scatter_turned_frames(target.table, frames.table, slots, GO, table(torch.bfloat16, [5, 9]))
    assert frames.table.status.tolist() == [PLACED, CORRUPT, CORRUPT]
    changed = [new != old for new, old in zip(target.bytes, clean, strict=True)]
    assert changed == [True, True, True, True, False, False]


def test_stop_before_the_first_frame() -> None:
    frames, slots, _ = kept("pairs NHD", torch.bfloat16)
    target = make_cache("pairs NHD", **SMALL, dtype=torch.bfloat16)  # type: ignore[arg-type]
    clean = target.bytes
    turn = table(torch.bfloat16, [5, 9])
    scatter_turned_frames(target.table, frames.table, slots, np.ones(1, np.uint8), turn)
    assert frames.table.status.tolist() == [PENDING] * 3
    assert target.bytes == clean


@pytest.mark.parametrize(
    ("harm", "match"),
    [({"dtype": "float32"}, "float32 in elements of 2"), ({"dtype": "int8"}, "int8"),
     ({"first": 1}, "channels 1 to 25"), ({"first": -2}, "channels -2"),
     ({"kind": np.zeros(2, np.int32)}, "2 layers for 3")],
)  # fmt: skip
def test_turns_of_another_model_are_refused(harm: dict, match: str) -> None:
    frames, slots, _ = kept("pairs NHD", torch.bfloat16)
    target = make_cache("pairs NHD", **SMALL, dtype=torch.bfloat16)  # type: ignore[arg-type]
    turn = replace(table(torch.bfloat16, [5, 9]), **harm)
    with pytest.raises(ValueError, match=match):
        scatter_turned_frames(target.table, frames.table, slots, GO, turn)
