"""The road to a GPU, over a fake of CUDA that refuses what a real one would (`fake_cuda.py`)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Engine, Open, config, settle, tokens
from fake_cuda import OUT_OF_MEMORY, Cuda, Illegal
from passages.blends import blending, opened_with

from tierloom import KVLayout, LayoutError, Lost
from tierloom.stages.kv import paged_copy as copy
from tierloom.stages.kv.layout_check import check_layout
from tierloom.stages.memory import cuda_driver, page_lock
from tierloom.stages.memory.arena import Arena
from tierloom.triton_kernels.memory.tables import FrameTable

ORDERS = ["2BNHD", "2BHND", "BNHD", "SHD", "BND", "BHNC"]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    made = Cuda().install(monkeypatch)
    yield made
    assert not made.locked, "memory is still page-locked"
    assert not made.error, "the engine's next launch fails with an error of ours"


@pytest.fixture
def opened(cuda: Cuda, opened: Open) -> Open:
    """Closed before the fake is taken away."""
    return opened


def on_device(cuda: Cuda, index: int, engine: Engine) -> Engine:
    """The engine with its cache in the memory of a device."""

    def move(layer: Any) -> Any:
        return tuple(map(move, layer)) if isinstance(layer, tuple) else cuda.tensor(layer, index)

    engine.caches = [move(layer) for layer in engine.caches]
    engine.layout = KVLayout.from_tensors(
        engine.caches, order=engine.order,
        block_tokens=engine.block if engine.order == "SHD" else None,
    )  # fmt: skip
    return engine


def blank(engine: Engine) -> Engine:
    other = engine.blank()
    for mine, theirs in zip(other.flat, engine.flat, strict=True):
        theirs.copy_(mine)
    return engine


def test_a_layout_knows_which_device(cuda: Cuda) -> None:
    one, two = (on_device(cuda, i, Engine()) for i in range(2))
    assert (one.layout.device, two.layout.device) == ("cuda:0", "cuda:1")
    with pytest.raises(LayoutError, match="cuda:1"):
        one.layout.check(two.caches)


@pytest.mark.parametrize("order", ORDERS)
def test_the_self_test_hands_no_other_memory_than_locked(cuda: Cuda, order: str) -> None:
    engine = on_device(cuda, 0, Engine(order))
    check_layout(engine.layout, native=False)
    if engine.layout.dense_blocks:
        check_layout(engine.layout, native=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("index", [0, 1])
def test_kv_of_any_device_comes_back(opened: Open, cuda: Cuda, order: str, index: int) -> None:
    """The engine's thread has another device current than the cache's, and so have the pool's."""
    engine = on_device(cuda, index, Engine(order))
    pipe, ids = opened(config(), engine), tokens(192)
    assert pipe.off is None
    at = engine.slots(192)
    assert pipe.store(ids, engine.caches, at).wait().tokens == 192
    kept = engine.rows(at).clone()
    blank(engine)
    got = pipe.retrieve(ids, engine.caches, at).wait()
    assert (got.tokens, got.lost) == (192, {})
    assert torch.equal(engine.rows(at), kept)
    assert engine.untouched(at)
    assert cuda.contexts == {index}, "half a GiB of a device that is another worker's"


@pytest.mark.parametrize("by", ["layer", "request"])
def test_a_store_waits_for_the_engines_own_stream(opened: Open, cuda: Cuda, by: str) -> None:
    """What the model computes is launched, and not there yet, when the store is asked for."""
    engine = on_device(cuda, 1, Engine())
    pipe = opened(config(graphs__store__pace={"by": by}), engine)
    ids, at, target = tokens(64), engine.slots(64), Engine(seed=5)
    stream = cuda.current_stream("cuda:1")

    def compute(layers: list[int]) -> None:
        for i in layers:
            stream.work.append(lambda i=i: engine.caches[i].copy_(target.caches[i]))

    if by == "layer":
        ticket = pipe.begin_store(ids, engine.caches, at)
        for i in range(engine.layers):
            compute([i])
            ticket.layer_done(i)
    else:
        compute(list(range(engine.layers)))
        ticket = pipe.store(ids, engine.caches, at)
    assert ticket.wait().tokens == 64
    blank(engine)
    assert pipe.retrieve(ids, engine.caches, at).wait().tokens == 64
    assert torch.equal(engine.rows(at), target.rows(at))


def test_a_layout_on_another_device_is_refused(opened: Open, cuda: Cuda) -> None:
    one, two = (on_device(cuda, i, Engine()) for i in range(2))
    pipe = opened(config(), one)
    with pytest.raises(LayoutError, match=r"on cuda:0, the layout given holds .* on cuda:1"):
        pipe.store(tokens(64), two.caches, two.slots(64), layout=two.layout)


def gather(engine: Engine, arena: Arena) -> None:
    """The first token into the arena's first frame."""
    frames = FrameTable(
        np.array([arena.address], np.int64), np.array([4096], np.int64),
        np.array([[0, 1]], np.int32), np.array([1], np.int32), np.array([1], np.int32),
        np.zeros(1, np.int64), np.zeros(1, np.uint64), np.zeros(1, np.uint8),
    )  # fmt: skip
    table, slots = engine.layout.planes(engine.caches), np.zeros(1, np.int64)
    copy.gather_now(table, frames, slots, np.zeros(1, np.uint8), engine.layout.device)


def test_memory_that_is_not_locked_is_never_launched_with(cuda: Cuda) -> None:
    engine = on_device(cuda, 0, Engine())
    arena = Arena(1 << 20, huge_pages=False)
    with pytest.raises(RuntimeError, match="not page-locked") as found:
        gather(engine, arena)
    assert not isinstance(found.value, Illegal), "it was launched"
    arena.pin("cuda:0")
    gather(engine, arena)
    arena.close()


@pytest.mark.parametrize("by", ["layer", "request"])
def test_what_is_given_up_while_the_device_copies_is_not_kept(
    opened: Open, cuda: Cuda, by: str
) -> None:
    engine = on_device(cuda, 0, Engine())
    pipe, ids = opened(config(graphs__store__pace={"by": by}), engine), tokens(64)
    copying, go = threading.Event(), threading.Event()
    waves = [1] * (engine.layers // 2 if by == "layer" else 1)

    def under_way() -> None:
        waves.pop()
        if not waves:  # the last one: all the others are kept whole by now
            copying.set()
            assert go.wait(10)

    cuda.under_way = under_way
    ticket = pipe.begin_store(ids, engine.caches, engine.slots(64))
    for i in range(engine.layers):
        ticket.layer_done(i)
    assert copying.wait(10)
    ticket._request.expire(Lost.CANCELLED)  # as a deadline does: it does not wait
    go.set()
    assert ticket.future.result(10).tokens == 0
    settle(pipe)
    assert pipe.stats()["tiers"]["hot"]["objects"] == 0
    assert pipe.lookup(ids) == 0


def held_up(cuda: Cuda, index: int, at: threading.Event, go: threading.Event) -> None:
    """The engine computes until it is told to go on."""

    def forward() -> None:
        at.set()
        assert go.wait(20)

    cuda.current_stream(f"cuda:{index}").work.append(forward)


def test_a_load_waits_neither_for_the_step_nor_for_saves_behind_it(
    opened: Open, cuda: Cuda
) -> None:
    """And no thread of the pool waits for the device."""
    engine = on_device(cuda, 0, Engine(blocks=200))
    pipe, ids = opened(config(budget={"arena": "4 MiB", "threads": 1}), engine), tokens(192)
    at = engine.slots(192)
    pipe.store(ids, engine.caches, at).wait()
    kept = engine.rows(at).clone()
    blank(engine)
    before, computing, go = pipe.event(), threading.Event(), threading.Event()
    held_up(cuda, 0, computing, go)
    saves = [
        pipe.store(tokens(64, seed=i), engine.caches, np.arange(2000, 2064)) for i in range(5, 9)
    ]
    assert computing.wait(10)  # the first of them waits for it
    got = pipe.retrieve(ids, engine.caches, at, after=before).wait(10)
    assert (got.tokens, got.lost) == (192, {})
    assert torch.equal(engine.rows(at), kept)
    assert not any(save.is_captured for save in saves)
    go.set()
    assert [save.wait(10).tokens for save in saves] == [64] * 4


@pytest.mark.parametrize("by", ["layer", "request"])
def test_the_stream_waits_for_saves_that_the_caller_does_not_wait_for(
    opened: Open, cuda: Cuda, by: str
) -> None:
    """The engine's thread goes on while the forward and the copy behind it are yet to be done; what
    it launches from then on is done behind both."""
    engine = on_device(cuda, 1, Engine())
    pipe = opened(config(graphs__store__pace={"by": by}), engine)
    ids, at = tokens(192), engine.slots(192)
    right, (computing, go) = engine.rows(at).clone(), (threading.Event(), threading.Event())
    held_up(cuda, 1, computing, go)
    ticket = pipe.begin_store(ids, engine.caches, at)
    ticket.layer_done(engine.layers - 1)
    assert ticket.fence(10)
    assert not ticket.is_captured, "it waited"
    stream = cuda.current_stream("cuda:1")
    stream.work.append(lambda: blank(engine))  # the next step's forward
    threading.Timer(0.05, go.set).start()
    stream.synchronize()
    assert ticket.wait(10).tokens == 192
    assert pipe.retrieve(ids, engine.caches, at).wait(10).tokens == 192
    assert torch.equal(engine.rows(at), right)


def test_a_save_that_is_not_launched_in_time_is_given_up(opened: Open, cuda: Cuda) -> None:
    """By layer, when the model does not come that far: what was launched is waited for by the
    stream, and the rest reads nothing any more."""
    engine = on_device(cuda, 0, Engine())
    pipe, ids = opened(config(graphs__store__pace={"by": "layer"}), engine), tokens(192)
    ticket = pipe.begin_store(ids, engine.caches, engine.slots(192))
    ticket.layer_done(1)
    assert not ticket.fence(0.2)
    blank(engine)
    assert ticket.wait(10).tokens == 0
    settle(pipe)
    assert pipe.lookup(ids) == 0


def test_a_device_that_fails_costs_misses(
    opened: Open, cuda: Cuda, caplog: pytest.LogCaptureFixture
) -> None:
    engine = on_device(cuda, 0, Engine())
    pipe, ids, at = opened(config(), engine), tokens(192), engine.slots(192)
    pipe.store(ids, engine.caches, at).wait()
    cuda.error_of_device = True
    assert pipe.store(tokens(64, seed=3), engine.caches, at[:64]).wait(10).tokens == 0
    ticket = pipe.retrieve(ids, engine.caches, at)
    assert ticket.wait(10).tokens == 0
    ticket.cancel()  # nothing of it is said to be under way
    settle(pipe)
    assert pipe.arena.flight == 0
    cuda.error_of_device = False


def test_nothing_is_under_way_when_a_launch_has_failed(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, done = on_device(cuda, 0, Engine()), []
    arena = Arena(1 << 20, huge_pages=False)
    arena.pin("cuda:0")

    def half(*_: Any, **__: Any) -> None:
        cuda.current_stream().work.append(lambda: done.append(1))
        raise ValueError("no such kernel")

    monkeypatch.setattr("tierloom.triton_kernels.paged_copy.triton.launch_paged_copy", half)
    with pytest.raises(ValueError, match="no such kernel"):
        gather(engine, arena)
    assert done == [1]
    arena.close()


@pytest.mark.parametrize("refuse", [0, 2, 3])
def test_page_locking_that_fails_is_undone(
    opened: Open, cuda: Cuda, monkeypatch: pytest.MonkeyPatch, refuse: int
) -> None:
    """An engine is told why there is no cache, and goes on; CUDA remembers nothing of it."""
    monkeypatch.setattr(page_lock, "CHUNK", 6 << 20)  # 20 MiB of arena at least: several calls
    cuda.refuse = refuse
    engine = on_device(cuda, 0, Engine())
    with pytest.raises(LayoutError, match=f"cuMemHostRegister.* code {OUT_OF_MEMORY}"):
        opened(config(), engine)
    assert len(cuda.registered) == refuse + 1
    assert not cuda.locked
    assert not cuda.error
    cuda.refuse = None
    pipe = opened(config(), engine)
    whole, rest = divmod(pipe.arena.total, 6 << 20)
    assert whole >= 3
    calls = cuda.registered[refuse + 1 :]  # and behind them those of the self-test's own arena
    assert calls[: whole + 1] == [6 << 20] * whole + [rest]
    assert pipe.store(tokens(64), engine.caches, engine.slots(64)).wait().tokens == 64


def test_memory_that_is_not_there_is_not_locked(
    opened: Open, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_lock, "available", lambda: page_lock.LEFT + (20 << 20) - 1)
    engine = on_device(cuda, 0, Engine())
    with pytest.raises(LayoutError, match=r"0 of \d+ MiB for cuda:0: .* lower the capacity"):
        opened(config(), engine)
    assert not cuda.registered


def test_no_driver_is_a_reason(opened: Open, cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(what: str) -> Any:
        raise LayoutError(f"{what} is not possible without NVIDIA's driver: no libcuda.so.1")

    engine = on_device(cuda, 0, Engine())
    monkeypatch.setattr(cuda_driver, "cuda_driver", none)
    with pytest.raises(LayoutError, match="libcuda"):
        opened(config(), engine)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MACHINE = {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:   8388608 kB\nHugePages_Total: 0\n"}
V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "gib"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n"}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/memory.max": "max\n"}, 8),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/b/memory.max": f"{7 << 30}\n",
                f"{V2}/a/b/memory.current": f"{2 << 30}\n",
                f"{V2}/a/memory.max": f"{6 << 30}\n",
                f"{V2}/a/memory.current": f"{5 << 30}\n",
                f"{V2}/a/memory.stat": f"anon 7\ninactive_file {2 << 30}\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/x\n3:hugetlb,memory:/not/mounted/here\n",
                f"{V1}/memory.limit_in_bytes": f"{3 << 30}\n",
                f"{V1}/memory.usage_in_bytes": f"{1 << 30}\n",
                f"{V1}/memory.stat": "total_inactive_file 0\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                f"{V2}/memory.max": "4096\n",
                f"{V2}/memory.current": "8192\n",
            },
            0,
        ),
    ],
)
def test_free_memory_is_what_every_group_leaves(
    tmp_path: Path, files: dict[str, str], gib: int
) -> None:
    assert page_lock.available(write(tmp_path, MACHINE | files)) == gib << 30


def test_free_memory_of_this_machine() -> None:
    assert 1 << 20 < page_lock.available() < 1 << 50
    assert page_lock.available(Path("/nowhere")) == 1 << 62


@pytest.mark.parametrize("order", ["2BNHD", "2BHND", "BHNC"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_passage_turned_on_a_device_is_that_turned_on_a_cpu(
    opened: Open, cuda: Cuda, order: str, dtype: torch.dtype
) -> None:
    kept = np.concatenate([tokens(64, 2), tokens(128, 1)])
    prompt = np.concatenate([tokens(70, 3), tokens(128, 1)])
    rows = []
    for device in (False, True):
        engine = Engine(order, layers=2, dtype=dtype)
        target = engine.blank()
        at, to = np.arange(192), np.arange(198)[::-1].copy()
        if device:
            engine, target = on_device(cuda, 0, engine), on_device(cuda, 0, target)
        pipe = opened_with(opened, blending(), engine)
        pipe.store(kept, engine.caches, at).wait()
        got = pipe.retrieve(prompt, target.caches, to, blend=True).wait(timeout=60)
        assert got.blended == 128
        rows.append(target.rows(to[70:]))
    assert torch.equal(rows[0], rows[1])


def test_scores_are_read_where_k_lies(opened: Open, cuda: Cuda) -> None:
    chosen = []
    for device in (False, True):
        engine = Engine(layers=2, dtype=torch.float32)
        target = engine.blank()
        if device:
            engine, target = on_device(cuda, 1, engine), on_device(cuda, 1, target)
        pipe = opened_with(opened, blending(policy="probe", heads=0, share="10 %"), engine)
        pipe.store(tokens(128, 1), engine.caches, np.arange(128)).wait()
        prompt = np.concatenate([tokens(70, 3), tokens(128, 1), tokens(5, 4)])
        ticket = pipe.retrieve(prompt, target.caches, np.arange(203), blend=True)
        assert ticket.wait(timeout=60).blended == 128
        for layer in range(2):
            make = torch.Generator().manual_seed(layer)
            queries = torch.randn(5, 2 * engine.heads, engine.dim, generator=make)
            ticket.scores(layer, queries.to("cuda:1") if device else queries)
        chosen.append(ticket.compute())
    assert chosen[0] == chosen[1]
    assert sum(b - a for a, b in chosen[0]) == 75 + 12
