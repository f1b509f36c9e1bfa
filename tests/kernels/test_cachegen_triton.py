"""cachegen in Triton against numba and the reference, bit for bit: pages to symbols, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from interpreter import run_interpreted
from paged_cases import Cache, Frames, make_cache, make_frames, make_slots

from tierloom.triton_kernels.cachegen import cpu, reference as cachegen_reference
from tierloom.triton_kernels.cachegen.symbols_triton import (
    launch_check_escapes,
    launch_choose_tables,
    launch_to_symbols,
)
from tierloom.triton_kernels.cachegen.triton import (
    CodeTables,
    Sites,
    launch_decode,
    launch_encode,
    launch_moments,
)
from tierloom.triton_kernels.paged_copy import reference
from tierloom.triton_kernels.paged_copy.triton import DeviceFrames, DevicePlanes

BITS = {torch.bfloat16: np.uint16, torch.float16: np.int16, torch.float32: np.uint32}
LAYERS, GROUPS, FIRST = 3, [(0, 2), (2, 3)], [3, 0]
"""Two frames; of the first, three tokens are spared."""
ROWS, TAKE, STARTS = [7, 5], [7, 4], [0, 500]
"""Rows behind the spared ones; those that have slots; the frames' first positions."""
REACH = np.array([127, 9, 1], np.int32)
ROOM = 4096


def bits_of(x: torch.Tensor) -> Any:
    made = np.frombuffer(x.contiguous().view(torch.uint8).numpy().tobytes(), BITS[x.dtype])
    return made.reshape(x.shape)


class Expected(NamedTuple):
    """One frame by numba, which `test_cachegen.py` holds to the reference."""

    x: torch.Tensor
    """[planes, rows, channels] as it is in the cache."""
    where: tuple
    means: np.ndarray
    spreads: np.ndarray


class Case:
    """A cache of numbers, frames of it, and what says how to code them."""

    def __init__(
        self, layout: str, dtype: torch.dtype, half: int, *,
        heads: int = 2, dim: int = 24, order: str = "holes",
    ) -> None:  # fmt: skip
        self.shape = {
            "layers": LAYERS, "blocks": 6, "block_tokens": 4, "heads": heads, "dim": dim,
            "dtype": dtype,
        }  # fmt: skip
        self.layout, self.dtype, self.half, self.dim = layout, dtype, half, dim
        rng = np.random.default_rng(half)
        self.slots = make_slots(sum(TAKE), 24, rng, order)
        self.here = make_cache(layout, **self.shape)
        make = torch.Generator().manual_seed(dim)
        for view in self.here.views:
            noise = torch.randn(view.shape, generator=make)
            view.copy_(noise * 3 + 5 * torch.randn(view.shape[-1], generator=make))
        self.kv, table = self.here.kv, self.here.table
        self.channels = table.heads * table.dim
        self.rows = [self.kv * (stop - start) for start, stop in GROUPS]
        freqs = (10000.0 ** -(np.arange(half) / max(half, 1))).astype(np.float32)
        self.frames = [self._expected(f, freqs) for f in range(2)]
        self.means = np.concatenate([e.means for e in self.frames]).astype(np.float32)
        spreads = np.concatenate([e.spreads for e in self.frames])
        self.steps = (np.sqrt(spreads) * rng.choice([0.02, 0.3, 2], spreads.shape)).astype("f4")
        self.steps[1, 2] = 0
        self.costs = rng.integers(0, 9000, (3, 256)).astype(np.int32)

    def _expected(self, f: int, freqs: np.ndarray) -> Expected:
        mine = self.slots[sum(TAKE[:f]) :][: TAKE[f]].tolist()
        found = reference.gather(self.here.views, self.kv, range(*GROUPS[f]), mine, ROWS[f])
        x = found.flatten(0, 1).flatten(2)
        turned = len(x) // self.kv if self.half else 0
        where = 0, turned, *cpu.turns(STARTS[f] + FIRST[f], ROWS[f], freqs), self.dim
        means, spreads = np.empty((2, len(x), self.channels))
        assert cpu.moments(bits_of(x), *where, means, spreads)
        return Expected(x, where, means, spreads)

    def profile(self, f: int) -> slice:
        return slice(sum(self.rows[:f]), sum(self.rows[: f + 1]))

    def poisoned(self, device: str) -> Cache:
        """The cache's like on a device."""
        return make_cache(self.layout, **self.shape, device=device)  # type: ignore[arg-type]

    def on(self, device: str) -> tuple[Cache, DevicePlanes, torch.Tensor]:
        """The cache itself, its planes, and the slots."""
        there = self.poisoned(device)
        for view, mine in zip(there.views, self.here.views, strict=True):
            view.copy_(mine)
        planes = DevicePlanes.of(there.table, device)
        return there, planes, torch.from_numpy(self.slots).to(device)

    def scales(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self.means).to(device), torch.from_numpy(self.steps).to(device)

    def room(self, itemsize: int, device: str) -> tuple[Frames, DeviceFrames]:
        """Frames for arrays of this many bytes an element."""
        made = make_frames(
            replace(self.here.table, itemsize=itemsize), GROUPS, ROWS, TAKE, device=device
        )
        return made, DeviceFrames.of(made.table, device)

    def sites(self, device: str, counts: list[int]) -> Sites:
        turns = zip(*(e.where[2:4] for e in self.frames), strict=True)
        cos, sin = (torch.from_numpy(np.concatenate(t)).to(device) for t in turns)
        table = []
        for f in range(2):
            k = self.profile(f).start
            v = k + self.rows[f] // self.kv
            table.append([sum(ROWS[:f]), k, v, sum(counts[:f]), counts[f]])
        return Sites(torch.tensor(table).to(device), cos, sin, self.dim)


def flags(device: str) -> torch.Tensor:
    return torch.zeros(2, dtype=torch.int32, device=device)


def escapes(tables: CodeTables, device: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each frame, by place."""
    lists = []
    for f, n in enumerate(tables.found.tolist()):
        places, values = (
            t[f * ROOM : f * ROOM + n].cpu().numpy() for t in (tables.places, tables.values)
        )
        by_place = np.argsort(places)
        lists.append((places[by_place], values[by_place]))
    return lists


def check(
    case: Case, device: str, shape: tuple[int, int] | None = None, width: int | None = None
) -> None:
    """Every kernel, each fed with what numba made before it."""
    kind = str(case.dtype).removeprefix("torch.")
    there, planes, slots = case.on(device)
    sites, scales, bad = case.sites(device, [ROOM, ROOM]), case.scales(device), flags(device)
    to_device = lambda a: torch.from_numpy(a).to(device)  # noqa: E731
    both = {"kv": case.kv, "channels": case.channels}

    q_room, q_frames = case.room(2, device)
    double = torch.full((2, sum(case.rows), case.channels), -1.0, dtype=torch.float64).to(device)
    launch_moments(planes, q_frames, slots, sites, *double, bad, kind=kind, block=width)
    launch_encode(planes, q_frames, slots, sites, *scales, bad, kind=kind, shape=shape)
    tabid = torch.full((sum(case.rows), case.channels), 77, dtype=torch.uint8, device=device)
    costs = to_device(np.ascontiguousarray(case.costs.T))
    launch_choose_tables(q_frames, sites, costs, tabid, **both, width=width)
    lists = [
        CodeTables(
            tabid, to_device(REACH), torch.zeros(2 * ROOM, dtype=torch.uint32, device=device),
            torch.zeros(2 * ROOM, dtype=torch.int32, device=device), flags(device),
        )
        for _ in range(2)
    ]  # fmt: skip
    (direct, direct_to), (later, later_to) = case.room(1, device), case.room(1, device)
    launch_to_symbols(q_frames, later_to, sites, lists[0], **both, shape=shape)
    launch_encode(
        planes, direct_to, slots, sites, *scales, bad, kind=kind, tables=lists[1], shape=shape
    )
    assert bad.tolist() == [0, 0]
    for view, mine in zip(there.views, case.here.views, strict=True):
        assert torch.equal(view.cpu(), mine)
    assert all(room.guards_hold() for room in (q_room, direct, later))

    wanted, coded = case.poisoned("cpu"), []
    for f, e in enumerate(case.frames):
        mine = case.profile(f)
        means, steps = case.means[mine], case.steps[mine]
        assert double[0, mine].cpu().numpy().tobytes() == e.means.tobytes()
        assert double[1, mine].cpu().numpy().tobytes() == e.spreads.tobytes()
        q = np.empty(e.x.shape, np.int16)
        assert cpu.quantize(bits_of(e.x), *e.where, means, steps, q)
        plain = cachegen_reference.quantize_reference(e.x.float().numpy(), *e.where, means, steps)
        assert np.array_equal(q, plain)
        assert q_room.content(f) == q.tobytes()
        chosen = np.empty(means.shape, np.uint8)
        cpu.choose_tables(q, case.costs, chosen)
        assert np.array_equal(tabid[mine].cpu().numpy(), chosen)
        symbols, places, values = cachegen_reference.symbols_reference(q, REACH, chosen)
        assert 1 < len(places) < ROOM
        assert direct.content(f) == later.content(f) == symbols.tobytes()
        for made in lists:
            found = escapes(made, device)[f]
            assert np.array_equal(found[0], places)
            assert np.array_equal(found[1], values)
        coded.append((places, values))
        back = np.empty(e.x.shape, BITS[case.dtype])
        used = cpu.dequantize(symbols, *e.where, means, steps, places, values, back)
        assert used == len(places)
        numbers = torch.from_numpy(back.view("i" + str(back.itemsize))).view(case.dtype)
        slots_of = case.slots[sum(TAKE[:f]) :][: TAKE[f]].tolist()
        table = case.here.table
        frame = numbers.view(case.kv, -1, ROWS[f], table.heads, table.dim)
        reference.scatter(wanted.views, frame, range(*GROUPS[f]), slots_of)

    target = case.poisoned(device)
    sites = case.sites(device, [len(places) for places, _ in coded])
    places, values = (to_device(np.concatenate(arrays)) for arrays in zip(*coded, strict=True))
    launch_check_escapes(direct_to, sites, places, bad, **both)
    launch_decode(
        DevicePlanes.of(target.table, device), direct_to, slots, sites, *scales, bad,
        places, values, kind=kind, shape=shape,
    )  # fmt: skip
    assert bad.tolist() == [0, 0]
    assert target.bytes == wanted.bytes


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_dtypes(device: str, dtype: torch.dtype) -> None:
    check(Case("pairs NHD", dtype, 12), device)


@pytest.mark.parametrize("layout", ["BLHNC", "MLA", "concatenated, K transposed"])
def test_layouts(device: str, layout: str) -> None:
    """All layers in one tensor; a latent; K element by element beside V as words."""
    check(Case(layout, torch.bfloat16, 0 if layout == "MLA" else 12, order="permuted"), device)


@pytest.mark.parametrize(
    ("half", "heads", "dim"), [(0, 2, 24), (3, 3, 7), (5, 1, 20), (1, 5, 3)],
)  # fmt: skip
def test_heads_turned_in_part(device: str, half: int, heads: int, dim: int) -> None:
    check(Case("block-first NHD", torch.float16, half, heads=heads, dim=dim), device)


def test_tiles_smaller_than_a_frame(device: str) -> None:
    check(Case("kv-first HND", torch.bfloat16, 12), device, shape=(4, 32), width=32)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_what_cannot_be_rounded(device: str, value: float) -> None:
    """One frame of two, as numba refuses it; the other is coded."""
    case = Case("pairs NHD", torch.float32, 12, order="permuted")
    slot = int(case.slots[sum(TAKE[:1])])
    case.here.views[LAYERS + 2][slot // 4, slot % 4, 1, 23] = value
    e = case._expected(0, np.ones(12, np.float32))
    _cache, planes, slots = case.on(device)
    sites, bad = case.sites(device, [0, 0]), flags(device)
    room, frames = case.room(2, device)
    launch_encode(planes, frames, slots, sites, *case.scales(device), bad, kind="float32")
    assert bad.tolist() == [0, 1]
    mine = case.profile(0)
    q = np.empty(e.x.shape, np.int16)
    where = case.frames[0].where
    assert cpu.quantize(bits_of(e.x), *where, case.means[mine], case.steps[mine], q)
    assert room.content(0) == q.tobytes()
    moments = torch.zeros(2, sum(case.rows), case.channels, dtype=torch.float64).to(device)
    bad.zero_()
    launch_moments(planes, frames, slots, sites, *moments, bad, kind="float32")
    assert bad.tolist() == [0, int(value != 1e9)]


@pytest.mark.parametrize("harm", ["none", "order", "twice", "beyond", "not one"])
def test_escapes_that_no_encoder_writes_are_refused(device: str, harm: str) -> None:
    """And nothing of such a frame is placed."""
    case = Case("pairs NHD", torch.bfloat16, 12, order="permuted")
    room, frames = case.room(1, device)
    sizes = [rows * n * case.channels for rows, n in zip(ROWS, case.rows, strict=True)]
    lists = [[0, 7, 300, sizes[0] - 1], [5, sizes[1] - 1]]
    for f, places in enumerate(lists):
        symbols = np.full(sizes[f], 130, np.uint8)
        symbols[places] = 0
        room.fill(f, symbols.tobytes())
    bad_list = lists[0]
    if harm == "order":
        bad_list[1], bad_list[2] = bad_list[2], bad_list[1]
    elif harm == "twice":
        bad_list[1] = bad_list[2]
    elif harm == "beyond":
        bad_list[3] = sizes[0]
    elif harm == "not one":
        bad_list[1] = 8
    sites, bad = case.sites(device, [4, 2]), flags(device)
    places = torch.tensor([*lists[0], *lists[1]]).to(torch.uint32).to(device)
    launch_check_escapes(frames, sites, places, bad, kv=2, channels=case.channels)
    assert bad.tolist() == [int(harm != "none"), 0]
    target = case.poisoned(device)
    before = [bytes(b) for b in target.bytes]
    launch_decode(
        DevicePlanes.of(target.table, device), frames, torch.from_numpy(case.slots).to(device),
        sites, *case.scales(device), bad, places,
        torch.full((6,), 1 << 30, dtype=torch.int32, device=device), kind="bfloat16",
    )  # fmt: skip
    changed = [new != old for new, old in zip(target.bytes, before, strict=True)]
    assert changed == [harm == "none"] * 4 + [True] * 2
    assert all(torch.isfinite(view).all() for view in target.views)


def test_escapes_without_room(device: str) -> None:
    """They are counted, and none is written behind the list's end."""
    case = Case("pairs NHD", torch.bfloat16, 12, order="permuted")
    _cache, planes, slots = case.on(device)
    _room, frames = case.room(1, device)
    made = CodeTables(
        torch.full((6, case.channels), 2, dtype=torch.uint8, device=device),
        torch.from_numpy(REACH).to(device), torch.full((9,), 77, dtype=torch.uint32).to(device),
        torch.full((9,), 77, dtype=torch.int32).to(device), flags(device),
    )  # fmt: skip
    bad = flags(device)
    sites = case.sites(device, [3, 5])
    launch_encode(
        planes, frames, slots, sites, *case.scales(device), bad, kind="bfloat16", tables=made
    )
    assert min(made.found.tolist()) > 5
    assert made.values[8].item() == 77
    assert (made.values[:8].abs() > 1).all()
    assert len(set(made.places[:3].tolist())) == 3


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_under_the_interpreter() -> None:
    run_interpreted(__file__, least=20)
