"""The numba copies against the reference, byte for byte, in every layout."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings, strategies as st
from paged_cases import LAYOUTS, NATIVE, Cache, make_cache, make_frames, make_slots

from tierloom.triton_kernels.memory.tables import CORRUPT, PENDING, PLACED, FrameTable, PlaneTable
from tierloom.triton_kernels.paged_copy import reference
from tierloom.triton_kernels.paged_copy.cpu import gather_frames, scatter_frames

if TYPE_CHECKING:
    from collections.abc import Callable

GO = np.zeros(1, np.uint8)
SMALL = {"layers": 3, "blocks": 7, "block_tokens": 4, "heads": 2, "dim": 16}
GROUPS, ROWS, TAKE = [(0, 2), (2, 3), (1, 3)], [9, 5, 6], [9, 3, 6]


def gathered(cache: Cache, slots: np.ndarray, f: int) -> torch.Tensor:
    start = sum(TAKE[:f])
    mine = slots[start : start + TAKE[f]].tolist()
    return reference.gather(cache.views, cache.kv, range(*GROUPS[f]), mine, ROWS[f])


def to_bytes(frame: torch.Tensor) -> bytes:
    return frame.contiguous().view(torch.uint8).numpy().tobytes()


def check_round_trip(shape: dict[str, object], layout: str, order: str, shift: int) -> None:
    """Gather from a random cache, then scatter into a poisoned one, both as the reference."""
    rng = np.random.default_rng(11)
    source = make_cache(layout, **shape, seed=5)  # type: ignore[arg-type]
    total = int(np.prod(source.views[0].shape[:2]))
    slots = make_slots(sum(TAKE), total, rng, order)
    frames = make_frames(source.table, GROUPS, ROWS, TAKE, shift=shift)
    before = source.bytes

    gather_frames(source.table, frames.table, slots, GO)

    assert source.bytes == before
    assert frames.guards_hold()
    assert frames.table.status.tolist() == [PLACED] * 3
    for f in range(3):
        assert frames.content(f) == to_bytes(gathered(source, slots, f))
        assert int(frames.table.checksum[f]) == xxhash.xxh3_64_intdigest(frames.content(f))

    target = make_cache(layout, **shape)  # type: ignore[arg-type]
    expected = make_cache(layout, **shape)  # type: ignore[arg-type]
    frames.table.status[:] = PENDING
    scatter_frames(target.table, frames.table, slots, GO)
    for f in range(3):
        mine = slots[sum(TAKE[:f]) :][: TAKE[f]].tolist()
        frame = gathered(source, slots, f)
        reference.scatter(expected.views, frame, range(*GROUPS[f]), mine)
    assert target.bytes == expected.bytes
    assert frames.table.status.tolist() == [PLACED] * 3


@pytest.mark.parametrize("order", ["permuted", "runs", "holes"])
@pytest.mark.parametrize("layout", [*LAYOUTS, *NATIVE])
def test_layouts(layout: str, order: str) -> None:
    check_round_trip({**SMALL, "dtype": torch.bfloat16}, layout, order, shift=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["pairs NHD", "pairs HND", "concatenated, K transposed"])
def test_dtypes(layout: str, dtype: torch.dtype) -> None:
    check_round_trip({**SMALL, "dtype": dtype}, layout, "runs", shift=0)


@pytest.mark.parametrize("layout", [*LAYOUTS, *NATIVE])
def test_rows_and_frames_at_odd_addresses(layout: str) -> None:
    odd = {**SMALL, "heads": 3, "dim": 7, "block_tokens": 5, "dtype": torch.uint8}
    check_round_trip(odd, layout, "holes", shift=1)


@settings(deadline=None, max_examples=60)
@given(
    layout=st.sampled_from([*LAYOUTS, *NATIVE]),
    dtype=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]),
    order=st.sampled_from(["permuted", "runs", "holes"]),
    heads=st.integers(1, 4),
    dim=st.integers(1, 70),
    block_tokens=st.integers(1, 20),
    shift=st.sampled_from([0, 8, 3]),
)
def test_any_shape(
    layout: str, dtype: torch.dtype, order: str, heads: int, dim: int, block_tokens: int, shift: int
) -> None:
    shape = {"layers": 3, "blocks": -(-40 // block_tokens), "block_tokens": block_tokens}
    check_round_trip({**shape, "heads": heads, "dim": dim, "dtype": dtype}, layout, order, shift)


def test_whole_blocks_in_native_order() -> None:
    cache = make_cache("block-first NHD", **SMALL, dtype=torch.bfloat16, seed=9)
    block_bytes = 4 * 2 * 16 * 2
    whole = cache.table
    planes = PlaneTable.of_blocks(whole.base, int(whole.stride[0, 0]), block_bytes, kv=2)
    ids = np.array([6, 0, 3], np.int64)
    frames = make_frames(planes, [(0, 3)], [3], [3])
    gather_frames(planes, frames.table, ids, GO)
    expected = torch.stack([view[ids] for view in cache.views])
    assert frames.content(0) == to_bytes(expected)
    target = make_cache("block-first NHD", **SMALL, dtype=torch.bfloat16)
    there = PlaneTable.of_blocks(target.table.base, planes.stride[0, 0], block_bytes, kv=2)
    scatter_frames(there, frames.table, ids, GO)
    poison = make_cache("block-first NHD", **SMALL, dtype=torch.bfloat16)
    for got, want, old in zip(target.views, cache.views, poison.views, strict=True):
        for block in range(7):
            assert to_bytes(got[block]) == to_bytes((want if block in ids else old)[block])


def test_checksum_can_be_left_out() -> None:
    cache = make_cache("pairs NHD", **SMALL, dtype=torch.bfloat16, seed=1)
    frames = make_frames(cache.table, [(0, 3)], [4], [4])
    frames.table.checksum[:] = 77
    gather_frames(cache.table, frames.table, np.arange(4), GO, checksum=False)
    assert frames.table.checksum.tolist() == [77]
    assert frames.table.status.tolist() == [PLACED]


@pytest.mark.parametrize("layout", ["pairs NHD", "pairs HND"])
@pytest.mark.parametrize("nbytes", [100, 1000, 3072])
def test_checksum_covers_the_stored_bytes(layout: str, nbytes: int) -> None:
    cache = make_cache(layout, **SMALL, dtype=torch.bfloat16, seed=1)
    frames = make_frames(cache.table, [(0, 3)], [8], [8])
    frames.table.nbytes[0] = nbytes
    gather_frames(cache.table, frames.table, np.arange(8), GO)
    assert int(frames.table.checksum[0]) == xxhash.xxh3_64_intdigest(frames.content(0))


def test_corrupt_frame_leaves_the_cache_untouched() -> None:
    source = make_cache("pairs NHD", **SMALL, dtype=torch.bfloat16, seed=1)
    frames = make_frames(source.table, [(0, 1), (1, 2), (2, 3)], [4] * 3, [4] * 3)
    slots = np.arange(12)
    gather_frames(source.table, frames.table, slots, GO)
    bad = bytearray(frames.content(1))
    bad[-1] ^= 1
    frames.fill(1, bytes(bad))
    frames.table.status[:] = PENDING

    target = make_cache("pairs NHD", **SMALL, dtype=torch.bfloat16)
    clean = target.bytes
    scatter_frames(target.table, frames.table, slots, GO)
    assert frames.table.status.tolist() == [PLACED, CORRUPT, PLACED]
    changed = [new != old for new, old in zip(target.bytes, clean, strict=True)]
    assert changed == [True, True, False, False, True, True]  # K and V of layers 0, 1, 2

    scatter_frames(target.table, frames.table, slots, GO, verify=False)
    assert frames.table.status.tolist() == [PLACED] * 3
    assert target.bytes[2] != clean[2]


@pytest.mark.parametrize("direction", [gather_frames, scatter_frames])
def test_stop_before_the_first_frame(direction: Callable[..., None]) -> None:
    cache = make_cache("pairs NHD", **SMALL, dtype=torch.bfloat16, seed=1)
    frames = make_frames(cache.table, [(0, 3)], [4], [4])
    before = cache.bytes
    direction(cache.table, frames.table, np.arange(4), np.ones(1, np.uint8))
    assert frames.table.status.tolist() == [PENDING]
    assert frames.guards_hold()
    assert set(frames.content(0)) == {0xA5}
    assert cache.bytes == before


def test_stop_between_frames() -> None:
    """The first frame's own first byte is the stop flag, so writing the frame raises it."""
    cache = make_cache("pairs NHD", **SMALL, dtype=torch.bfloat16, seed=1)
    cache.views[0].view(torch.uint8)[0, 0, 0, 0] = 1
    frames = make_frames(cache.table, [(0, 1), (1, 2)], [4, 4], [4, 4])
    start = int(frames.table.address[0]) - frames.buffer.data_ptr()
    flag = frames.buffer.numpy()[start : start + 1]
    flag[0] = 0
    gather_frames(cache.table, frames.table, np.arange(8), flag)
    assert frames.table.status.tolist() == [PLACED, PENDING]
    assert set(frames.content(1)) == {0xA5}


@pytest.mark.parametrize("direction", [gather_frames, scatter_frames])
def test_another_thread_can_stop_a_batch(direction: Callable[..., None]) -> None:
    """So the call holds no GIL: else the flag would rise when everything was done."""
    cache = make_cache("pairs NHD", **{**SMALL, "dim": 1024}, dtype=torch.bfloat16, seed=1)
    one = make_frames(cache.table, [(0, 3)], [28], [28])
    gather_frames(cache.table, one.table, np.arange(28), GO)
    copies = 100_000
    names = FrameTable.__slots__
    columns = {name: getattr(one.table, name).repeat(copies, axis=0) for name in names}
    columns["status"][:] = PENDING
    frames = FrameTable(**columns)
    stop = np.zeros(1, np.uint8)
    args = (cache.table, frames, np.arange(28), stop)
    thread = threading.Thread(target=direction, args=args)
    thread.start()
    while frames.status[0] == PENDING:
        time.sleep(0)
    stop[0] = 1
    thread.join()
    assert frames.status[-1] == PENDING


def test_no_frames() -> None:
    cache = make_cache("pairs NHD", **SMALL, dtype=torch.bfloat16)
    frames = make_frames(cache.table, [], [], [])
    frames.table.layer.shape = (0, 2)
    before = cache.bytes
    gather_frames(cache.table, frames.table, np.arange(0), GO)
    scatter_frames(cache.table, frames.table, np.arange(0), GO)
    assert cache.bytes == before


@pytest.mark.parametrize("shift", [0, 2, 16, 62])
@pytest.mark.parametrize("row", [128, 1024, 1088, 2048])
def test_long_runs_in_memory_of_any_alignment(shift: int, row: int) -> None:
    """An engine's cache need not begin on a line; streaming stores need it."""
    rng = np.random.default_rng(0)
    blocks, block, tokens = 6, 16, 50
    size = blocks * block * row
    memory = rng.integers(0, 256, size + 256, np.uint8)
    start = -memory.ctypes.data % 64 + shift
    cache = memory[start : start + size]
    planes = PlaneTable(
        np.array([cache.ctypes.data]),
        np.array([[block * row, row, row, 2]]),
        1,
        block,
        1,
        row // 2,
        2,
    )
    slots = (rng.permutation(blocks)[:4, None] * block + np.arange(block)).ravel()[:tokens]
    frame = np.full(tokens * row + 128, 0xA5, np.uint8)
    at = -frame.ctypes.data % 64
    one = lambda kind, value: np.array([value], kind)  # noqa: E731
    frames = FrameTable(
        one(np.int64, frame.ctypes.data + at), one(np.int64, tokens * row), one(np.int32, [0, 1]),
        one(np.int32, tokens), one(np.int32, tokens), one(np.int64, 0), one(np.uint64, 0),
        one(np.uint8, 0),
    )  # fmt: skip
    stop = np.zeros(1, np.uint8)
    wanted = cache.reshape(-1, row)[slots].ravel()
    gather_frames(planes, frames, slots, stop)
    assert (frame[at : at + tokens * row] == wanted).all()
    assert (frame[:at] == 0xA5).all()
    assert (frame[at + tokens * row :] == 0xA5).all()
    assert int(frames.checksum[0]) == xxhash.xxh3_64_intdigest(wanted)
    memory[:] = 0xA5
    scatter_frames(planes, frames, slots, stop)
    assert (cache.reshape(-1, row)[slots].ravel() == wanted).all()
    rest = np.setdiff1d(np.arange(blocks * block), slots)
    assert (cache.reshape(-1, row)[rest] == 0xA5).all()
    assert (memory[:start] == 0xA5).all()
    assert (memory[start + size :] == 0xA5).all()
