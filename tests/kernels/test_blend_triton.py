"""Frames placed with their K turned, Triton against the numba twin byte for byte; what tokens
attend to, what they get by it, and how far rows deviate, against the same in float64.

Each test runs twice: under Triton's interpreter, in a child process, and on a CUDA device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from interpreter import run_interpreted
from paged_cases import LAYOUTS, Cache, make_cache, make_frames, make_slots
from test_blend_cpu import DTYPES, GO, GROUPS, ROWS, SMALL, TAKE, kept, table

from tierloom.triton_kernels.blend import (
    attention_triton,
    deviation_triton,
    probe_triton,
    reference,
)
from tierloom.triton_kernels.blend.attention_triton import launch_blend_attention
from tierloom.triton_kernels.blend.cpu import scatter_turned_frames
from tierloom.triton_kernels.blend.deviation_cpu import deviation
from tierloom.triton_kernels.blend.deviation_triton import launch_deviation
from tierloom.triton_kernels.blend.probe_cpu import probe_scores
from tierloom.triton_kernels.blend.probe_triton import launch_probe_scores
from tierloom.triton_kernels.blend.triton import DeviceTurns, launch_scatter_turned
from tierloom.triton_kernels.blend.turns import TurnTable
from tierloom.triton_kernels.paged_copy.cpu import gather_frames
from tierloom.triton_kernels.paged_copy.triton import DeviceFrames, DevicePlanes

if TYPE_CHECKING:
    from collections.abc import Callable


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


def attending(layout: str, dtype: torch.dtype) -> tuple[Cache, np.ndarray, list]:
    """As `probed`, with V, and what two groups of queries get: few of them, and more than a tile
    of rows, one of which sees nothing."""
    cache, slots, _, _ = probed(layout, dtype)
    make = torch.Generator().manual_seed(2)
    k, v = cache.views[LAYER], cache.views[PROBED["layers"] + LAYER]
    here = torch.from_numpy(slots >= 0)
    v.fill_(torch.nan)
    values = torch.randn(TOKENS, 2, 24, generator=make).to(dtype)
    v[slots[here] // 4, slots[here] % 4] = values[here]
    keys = torch.zeros_like(values)
    keys[here] = k[slots[here] // 4, slots[here] % 4]
    values[~here] = 0
    cases = []
    for positions in (POSITIONS, torch.tensor([-1, *range(TOKENS)])):
        queries = torch.randn(len(positions), 6, 24, generator=make).to(dtype)
        want = reference.attended(
            queries.double(), keys.double(), values.double(), positions, here, SCALE
        )
        cases.append((queries, positions, want.float()))
    assert not cases[1][2][0].any()
    return cache, slots, cases


@pytest.mark.parametrize("splits", [1, 3, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", KEY_LAYOUTS)
def test_attention(device: str, layout: str, dtype: torch.dtype, splits: int | None) -> None:
    cache, slots, cases = attending(layout, dtype)
    there = make_cache(layout, **PROBED, dtype=dtype, device=device)  # type: ignore[arg-type]
    for view, mine in zip(there.views, cache.views, strict=True):
        view.copy_(mine)
    planes = DevicePlanes.of(there.table, device)
    at = torch.from_numpy(slots).to(device)
    for queries, positions, want in cases:
        got = launch_blend_attention(
            planes, LAYER, PROBED["layers"] + LAYER, at, queries.to(device), positions.to(device),
            scale=SCALE, splits=splits,
        )  # fmt: skip
        assert got.dtype == dtype
        most = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.cpu().float(), want, rtol=most, atol=most)


def deviating(
    layout: str, dtype: torch.dtype
) -> tuple[Cache, np.ndarray, torch.Tensor, torch.Tensor]:
    """Random rows, NaN where no token is, and what they deviate by."""
    cache = make_cache(layout, **PROBED, dtype=dtype)  # type: ignore[arg-type]
    make = torch.Generator().manual_seed(4)
    slots = make_slots(TOKENS, 48, np.random.default_rng(0), "permuted")
    kept = torch.randn(len(cache.views), TOKENS, *cache.views[0].shape[2:], generator=make)
    kept = kept.to(dtype)
    fresh = torch.randn(kept.shape, generator=make).to(dtype)
    fresh[:, 7] = kept[:, 7]
    for view, rows in zip(cache.views, kept, strict=True):
        view.fill_(torch.nan)
        view[slots // 4, slots % 4] = rows
        view[slots[20] // 4, slots[20] % 4] = torch.nan
    slots[20] = -1
    want = reference.deviation(fresh.double(), kept.double()).float()
    want[:, 20] = 0
    assert not want[:, 7].any()
    return cache, slots, fresh, want


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [*KEY_LAYOUTS, "MLA"])
def test_deviation_on_a_cpu(layout: str, dtype: torch.dtype) -> None:
    cache, slots, fresh, want = deviating(layout, dtype)
    torch.testing.assert_close(deviation(cache.table, slots, fresh), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("layout", "width"), [*((name, 512) for name in (*KEY_LAYOUTS, "MLA")), ("pairs NHD", 16)]
)
def test_deviation(device: str, layout: str, width: int, dtype: torch.dtype) -> None:
    cache, slots, fresh, want = deviating(layout, dtype)
    there = make_cache(layout, **PROBED, dtype=dtype, device=device)  # type: ignore[arg-type]
    for view, mine in zip(there.views, cache.views, strict=True):
        view.copy_(mine)
    got = launch_deviation(
        DevicePlanes.of(there.table, device), torch.from_numpy(slots).to(device), fresh.to(device),
        width=width,
    )  # fmt: skip
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-6)


def test_a_model_is_repaired_by_them(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers' selective recompute asks of them on a GPU, against torch on a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tierloom.adapters.transformers import kernels
    from tierloom.adapters.transformers.model import rope, shape_of
    from tierloom.adapters.transformers.selective import Selective
    from tierloom.stages.kv.rope import rotation

    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=97, num_hidden_layers=2, num_key_value_heads=2, **size)
    model = LlamaForCausalLM(config).eval()
    shape = shape_of(model)
    turns = rotation(rope(model), shape.dim, shape.layers)
    ids, mask = torch.arange(90) * 7 % 97, np.zeros(90, np.bool_)
    mask[[0, 5, 6, 7, 40, *range(60, 70)]] = True

    def repaired(model: torch.nn.Module, where: str) -> list[torch.Tensor]:
        selective = Selective(model, shape_of(model), turns)
        planes = torch.randn(2, 2, 1, 2, 90, 16, generator=torch.Generator().manual_seed(1))
        planes, there = planes.to(where), ids.to(where)
        keys, values = list(planes[0]), list(planes[1])
        copies = [k.clone() for k in keys], [v.clone() for v in values]
        deviations = selective.deviations(there, *copies, 1, "both", first=8)
        scores = selective.scores(there[:9], keys, values)
        selective.recompute(there, mask, keys, values)
        return [planes.cpu(), torch.from_numpy(deviations), torch.from_numpy(scores)]

    launched = set()

    def noted(real: Callable[..., object]) -> Callable[..., object]:
        return lambda *given, **more: launched.add(real) or real(*given, **more)

    want = repaired(model, "cpu")
    for module, name in (
        (attention_triton, "launch_blend_attention"),
        (probe_triton, "launch_probe_scores"),
        (deviation_triton, "launch_deviation"),
    ):
        monkeypatch.setattr(module, name, noted(getattr(module, name)))
    monkeypatch.setattr(kernels, "on_gpu", lambda t: True)
    for got, was in zip(repaired(model.to(device), device), want, strict=True):
        torch.testing.assert_close(got, was, rtol=1e-4, atol=1e-4)
    assert len(launched) == 3


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_under_the_interpreter() -> None:
    run_interpreted(__file__, least=80)
