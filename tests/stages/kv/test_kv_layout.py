"""KVLayout: every order against plain indexing, and what it refuses."""

import numpy as np
import pytest
import torch

from tierloom.stages.errors import InputError, LayoutError
from tierloom.stages.kv import layout_check as selftest
from tierloom.stages.kv.layout import ORDERS, KVLayout

B, N, H, D, LAYERS = 5, 8, 3, 16, 2
SHAPES = {
    "2BNHD": (2, B, N, H, D),
    "B2NHD": (B, 2, N, H, D),
    "2BHND": (2, B, H, N, D),
    "B2HND": (B, 2, H, N, D),
    "BNHD": (B, N, H, D),
    "BHND": (B, H, N, D),
    "SHD": (B * N, H, D),
    "BND": (B, N, D),
    "BHNC": (B, H, N, 2 * D),
    "BHNC-KT": (B, H, N, 2 * D),
}


def caches(order: str, dtype: torch.dtype = torch.float32) -> list:
    def one() -> torch.Tensor:
        return torch.randint(0, 100, SHAPES[order]).to(dtype)

    return [(one(), one()) if order in ("BNHD", "BHND", "SHD") else one() for _ in range(LAYERS)]


def layout_of(order: str, dtype: torch.dtype = torch.float32) -> tuple[KVLayout, list]:
    made = caches(order, dtype)
    return KVLayout.from_tensors(
        made, order=order, block_tokens=N if order == "SHD" else None
    ), made


def test_every_order_is_tested() -> None:
    assert set(SHAPES) == set(ORDERS)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_the_self_test_passes(order: str, dtype: torch.dtype) -> None:
    layout, _ = layout_of(order, dtype)
    selftest.check_layout(layout, native=False)
    if layout.dense_blocks:
        selftest.check_layout(layout, native=True)


@pytest.mark.parametrize("order", ORDERS)
def test_a_plane_is_where_indexing_says(order: str) -> None:
    layout, made = layout_of(order)
    table = layout.planes(made)
    for kv in range(layout.kv):
        for i, layer in enumerate(made):
            base, step = table.base[kv * LAYERS + i], table.stride[kv * LAYERS + i]
            for slot in (0, N - 1, N, B * N - 1):
                view = selftest.token(layout, layer, kv, slot)
                at = base + slot // N * step[0] + slot % N * step[1]
                assert view.data_ptr() == at
                assert [s * 4 for s in view.stride()] == [step[2], step[3]] or view.shape[0] == 1


@pytest.mark.parametrize("order", ORDERS)
def test_a_wrong_stride_fails_the_self_test(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that changes its layout under an old name must not get wrong bytes."""
    layout, _ = layout_of(order)
    real = KVLayout.planes

    def shifted(self: KVLayout, caches: list, *, native: bool = False) -> object:
        table = real(self, caches, native=native)
        table.stride[:, 1] = table.stride[:, 1] // 2 + table.stride[:, 3] * 2
        return table

    monkeypatch.setattr(KVLayout, "planes", shifted)
    with pytest.raises(LayoutError):
        selftest.check_layout(layout, native=False)


def test_nothing_is_guessed() -> None:
    with pytest.raises(LayoutError, match="fits 2BNHD and B2NHD: name the one"):
        KVLayout.from_tensors([torch.zeros(2, 2, N, H, D)], order="NHD")
    with pytest.raises(LayoutError, match="unknown; known"):
        KVLayout.from_tensors([torch.zeros(2, 5, N, H, D)], order="XYZ")
    with pytest.raises(LayoutError, match="fits none"):
        KVLayout.from_tensors([torch.zeros(3, 5, N, H, D)], order="NHD")
    with pytest.raises(LayoutError, match="empty"):
        KVLayout.from_tensors([], order="NHD")


@pytest.mark.parametrize(
    ("made", "order", "options", "says"),
    [
        ([torch.zeros(2, 5, N, H, D), torch.zeros(2, 6, N, H, D)], "2BNHD", {}, "layer 1"),
        ([torch.zeros(2, 5, N, H, D), torch.zeros(2, 5, N, H, D).half()], "2BNHD", {}, "layer 1"),
        ([torch.zeros(2, 5, N, H, D, dtype=torch.int64)], "2BNHD", {}, "int64 is not kept"),
        ([torch.zeros(2, 5, N, H, 2 * D)[..., ::2]], "2BNHD", {}, "contiguous"),
        ([torch.zeros(2, 5, N, H, D)], "2BNHD", {"block_tokens": 4}, "block_tokens=4"),
        ([(torch.zeros(40, H, D), torch.zeros(40, H, D))], "SHD", {}, "say block_tokens="),
        ([torch.zeros(5, H, N, 2 * D + 1)], "BHNC", {}, "side by side"),
        ([torch.zeros(40, H, D)], "SHD", {"block_tokens": N}, "fits none"),
    ],
)
def test_wrong_tensors_are_named(made: list, order: str, options: dict, says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        KVLayout.from_tensors(made, order=order, **options)


@pytest.mark.parametrize(
    ("slots", "says"),
    [
        ([0, 1], "2 slots for 3"),
        ([0, -1, 2], r"slots\[1\] is -1"),
        ([0, 1, B * N], rf"slots\[2\] is {B * N}, outside 0..{B * N - 1}"),
        ([0.0, 1.0, 2.0], "integers"),
        (np.zeros((3, 1), int), "1-D"),
    ],
)
def test_wrong_slots_are_named(slots: object, says: str) -> None:
    layout, _ = layout_of("2BNHD")
    with pytest.raises(InputError, match=says):
        layout.check_slots(slots, 3)


def test_blocks_become_rows() -> None:
    layout, _ = layout_of("2BNHD")
    rows = layout.rows_of_blocks(torch.tensor([3, 1]), 10, native=False)
    assert rows.tolist() == [*range(24, 32), 8, 9]
    skipped = layout.rows_of_blocks([-1, 1], 10, native=False)
    assert skipped.tolist() == [*[-1] * 8, 8, 9]
    assert layout.rows_of_blocks([-1, 1, 2], 10, native=True).tolist() == [-1, 1]
    for wrong in ([3, B], [3, -2]):
        with pytest.raises(InputError, match=r"blocks\[1\].*outside"):
            layout.rows_of_blocks(wrong, 10, native=False)
    with pytest.raises(InputError, match="1 blocks of 8 for 10 tokens"):
        layout.rows_of_blocks([3], 10, native=False)


def test_native_rows_are_whole_blocks() -> None:
    layout, _ = layout_of("2BHND")
    slots = np.array([*range(24, 32), 8, 9], np.int64)
    assert layout.block_rows(slots).tolist() == [3, 1]
    for bad in ([1, 2], [0, 2], [*range(8), 9]):
        with pytest.raises(InputError, match="breaks a block"):
            layout.block_rows(np.array(bad, np.int64))


def test_a_table_is_made_again_for_other_tensors() -> None:
    import gc

    from tierloom.stages.kv.pointer_cache import PointerCache

    layout, made = layout_of("BNHD")
    tables = PointerCache()
    first = tables.of(layout, made, native=False)
    assert tables.of(layout, list(made), native=False) is first
    assert tables.of(layout, made, native=True) is not first
    other = caches("BNHD")
    second = tables.of(layout, other, native=False)
    assert second.base.tolist() != first.base.tolist()
    with pytest.raises(LayoutError):
        tables.of(layout, [*other[:-1], (other[-1][0], other[-1][1].half())], native=False)
    del other
    gc.collect()
    again = caches("BNHD")  # perhaps at the same addresses
    assert tables.of(layout, again, native=False) is not second


def test_native_bytes_name_their_layout() -> None:
    prints = {layout_of(o)[0].fingerprint for o in ORDERS if o != "SHD"}
    assert len(prints) == len(ORDERS) - 1
    longer = KVLayout.from_tensors([torch.zeros(2, 9, N, H, D)], order="2BNHD")
    shorter = KVLayout.from_tensors([torch.zeros(2, 4, N, H, D)], order="2BNHD")
    assert (
        longer.fingerprint == shorter.fingerprint
    )  # how many blocks there are is nobody's business


def test_mla() -> None:
    layout = KVLayout.mla([torch.zeros(4, 8, 576)] * 3)
    assert (layout.kv, layout.heads, layout.dim, layout.block_tokens) == (1, 1, 576, 8)
    assert layout.geometry(native=False).frame_bytes(3, 10) == 3 * 10 * 576 * 4
