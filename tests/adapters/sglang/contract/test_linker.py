"""The cache linker with SGLang's own radix tree and pools, and by itself."""

from __future__ import annotations

import threading
import time
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from awkward import Mood, over
from backend import BASE, PAGE, hashes, on_disk
from device_pools import device_pool
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import (
    InitLoadBackParams,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache import unified_cache_linker
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.linker_factory import create_unified_cache_linker
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_server_args
from sizes import LAYERS

from tierloom import ConfigError

if TYPE_CHECKING:
    pass

SLOTS = 512
_SGLANGS = ("backend_name", "class_name", "interface_v1", "module_path", "chunk.tokens")
MEMORY = {k: v for k, v in BASE.items() if k not in _SGLANGS}
AWKWARD = {k: v for k, v in MEMORY.items() if not k.startswith("tiers.")}


def disk(folder: Path) -> dict[str, Any]:
    return {k: v for k, v in on_disk(folder).items() if k not in _SGLANGS}


class Bench:
    """A device pool, its allocator, and a linker made by SGLang's factory."""

    def __init__(
        self, kind: str, extra: dict[str, Any], components: Any = None, *, group: Any = None
    ) -> None:
        self.pool = device_pool(kind, slots=SLOTS)
        self.allocator = PagedTokenToKVPoolAllocator(
            SLOTS, PAGE, torch.float32, "cpu", self.pool, False
        )
        self.params = CacheInitParams(
            disable=False, req_to_token_pool=ReqToTokenPool(8, SLOTS, "cpu", False),
            token_to_kv_pool_allocator=self.allocator, page_size=PAGE,
            tree_components=(ComponentType.FULL,), tp_cache_group=group,
        )  # fmt: skip
        self.linker = create_unified_cache_linker(
            get_server_args(), self.params, backend="dynamic",
            components=components or {ComponentType.FULL},
            config={
                "linker": "TierloomLinker", "linker_module_path": "tierloom.adapters.sglang.linker",
                "linker_extra_config": extra,
            },
        )  # fmt: skip

    @property
    def buffers(self) -> list[torch.Tensor]:
        pool = self.pool
        return (
            [*pool.k_buffer, *pool.v_buffer] if hasattr(pool, "k_buffer") else list(pool.kv_buffer)
        )

    def fill(self, slots: torch.Tensor) -> list[torch.Tensor]:
        for buffer in self.buffers:
            buffer[slots] = torch.randn(len(slots), *buffer.shape[1:])
        return [buffer[slots].clone() for buffer in self.buffers]

    def transfer(self, keys: list[str], slots: torch.Tensor | None = None) -> list[Any]:
        return [PoolTransfer(PoolName.KV, device_indices=slots, keys=keys)]

    def store(self, keys: list[str], *, whole: bool = True) -> list[torch.Tensor]:
        slots = self.allocator.alloc(len(keys) * PAGE)
        content = self.fill(slots)
        assert self.linker.offload(self.transfer(keys, slots))
        until(lambda: self.linker.num_completed_offloads() == 1)
        assert self.linker.pop_completed_offload()
        if whole:
            until(lambda: len(self.linker._memory.intersection(keys)) == len(keys))
        self.allocator.free(slots)
        return content

    def load(self, rid: str, keys: list[str]) -> list[torch.Tensor] | None:
        """What was loaded, once it is whole; None where the linker would not."""
        slots = self.allocator.alloc(len(keys) * PAGE)
        for buffer in self.buffers:
            buffer[slots] = 7
        try:
            if not self.linker.load(rid, self.transfer(keys, slots)):
                return None
            index = self.linker.start_layer_wise_loading()
            self.linker.layer_done_counter.set_consumer(index)
            for layer in range(LAYERS):
                self.linker.layer_done_counter.wait_until(layer)
            assert self.linker.finish_layer_wise_loading(index), "SGLang would answer with 503"
            return [buffer[slots].clone() for buffer in self.buffers]
        finally:
            self.allocator.free(slots)


def until(holds: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to be in time"
        time.sleep(0.002)


def same(a: list[torch.Tensor] | None, b: list[torch.Tensor], first: int = 0) -> bool:
    return a is not None and all(
        torch.equal(x, y[first * PAGE :]) for x, y in zip(a, b, strict=True)
    )


def keys_of(seed: int, pages: int) -> list[str]:
    return hashes([(seed * 7919 + i * i) % 50_000 for i in range(pages * PAGE)])


def test_the_door_of_the_first_rank() -> None:
    bench = Bench("mha", MEMORY | {"tierloom.http": "127.0.0.1:0"})
    assert httpx.get(f"{bench.linker._door.url}/readyz", trust_env=False).status_code == 200
    bench.linker.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{bench.linker._door.url}/livez", trust_env=False)


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_pages_come_back(kind: str) -> None:
    bench, keys = Bench(kind, MEMORY), keys_of(1, 12)
    content = bench.store(keys)
    assert bench.linker.lookup("a", bench.transfer(keys)) == [12]
    assert same(bench.load("a", keys), content)
    assert same(bench.load("b", keys[5:]), content, 5)
    assert bench.linker.lookup("c", bench.transfer([*keys[3:], "0" * 64])) == [9]
    assert bench.linker.lookup("d", bench.transfer(["0" * 64, *keys])) == []
    bench.linker.close()


def test_through_sglangs_tree() -> None:
    bench = Bench("mha", MEMORY)
    cache = UnifiedRadixCache(bench.params)
    cache.init_cache_linker(bench.linker)
    bench.pool.register_layer_transfer_counter(bench.linker.layer_done_counter)
    ids = array("q", range(100, 116))
    slots = bench.allocator.alloc(16)
    content = bench.fill(slots)
    cache.insert(
        InsertParams(key=RadixKey(ids, cache_salt="t"), value=slots.to(torch.int64), inserted_len=0)
    )
    until(lambda: bench.linker.num_completed_offloads() == 1)
    cache.check_hicache_events()
    assert not cache.linker.pending_offloads
    until(lambda: len(bench.linker._memory) == 4)
    cache.reset()
    bench.allocator.clear()
    for buffer in bench.buffers:
        buffer.zero_()
    longer = array("q", [*ids, 1, 2, 3, 4])

    def match(rid: str, salt: str) -> Any:
        req = SimpleNamespace(rid=rid, prefix_len=0, session=None)
        return cache.match_prefix(MatchPrefixParams(key=RadixKey(longer, cache_salt=salt), req=req))

    assert match("other", "another tenant").host_hit_length == 0
    found = match("r1", "t")
    assert found.host_hit_length == 16
    req = SimpleNamespace(
        session=None, rid="r1", last_node=found.last_device_node, kv=None,
        swa_branching_seqlen=None, swa_host_hit_length=0, mamba_host_hit_length=0,
    )  # fmt: skip
    loaded, _ = cache.init_load_back(
        InitLoadBackParams(
            best_match_node=found.best_match_node, host_hit_length=found.host_hit_length, req=req
        )
    )
    assert loaded == 16
    bench.linker.layer_done_counter.set_consumer(cache.ready_to_load_host_cache())
    where = cache.linker.private_load_indices["r1"]
    got = [bench.pool.get_key_buffer(i)[where] for i in range(LAYERS)]
    got += [bench.pool.get_value_buffer(i)[where] for i in range(LAYERS)]
    assert same(got, content)
    assert cache.linker.finish_loads() == []
    bench.linker.close()


def test_after_a_restart_the_second_question_hits(tmp_path: Path) -> None:
    bench, keys = Bench("mha", disk(tmp_path)), keys_of(1, 20)
    content = bench.store(keys)
    runner = bench.linker._store.pipeline._runners["store"]
    until(lambda: not runner.open)
    bench.linker.close()
    again = Bench("mha", disk(tmp_path))
    assert again.linker.lookup("a", again.transfer(keys)) == []
    until(lambda: again.linker.lookup("b", again.transfer(keys)) == [20])
    assert same(again.load("b", keys), content)
    again.linker.close()


def test_what_is_gone_since_the_question_is_computed() -> None:
    bench, keys = Bench("mha", MEMORY), keys_of(1, 8)
    bench.store(keys)
    assert bench.linker.lookup("a", bench.transfer(keys)) == [8]
    pipeline = bench.linker._store.pipeline
    pipeline._portal.call(pipeline.tiers["hot"].delete, [bytes.fromhex(keys[3])])
    assert bench.load("a", keys) is None
    assert bench.linker.start_layer_wise_loading() == -1
    assert bench.linker.lookup("a", bench.transfer(keys)) == [3]  # now each page is looked at
    bench.linker.close()


def test_what_is_held_cannot_be_evicted_or_cleared_away() -> None:
    bench, keys = Bench("mha", MEMORY), keys_of(1, 8)
    content = bench.store(keys)
    slots = bench.allocator.alloc(8 * PAGE)
    assert bench.linker.load("a", bench.transfer(keys, slots))
    bench.linker._store.pipeline.clear()
    index = bench.linker.start_layer_wise_loading()
    assert bench.linker.finish_layer_wise_loading(index)
    assert same([b[slots] for b in bench.buffers], content)
    assert bench.linker.lookup("b", bench.transfer(keys)) == []
    bench.linker.close()


@pytest.mark.parametrize("pages", [1, 7, 8, 9, 16, 23, 40])
def test_the_end_of_what_is_in_memory_is_found(pages: int) -> None:
    bench, keys = Bench("mha", MEMORY), keys_of(1, 40)
    bench.store(keys[:pages])
    for asked in (pages, 40):
        assert bench.linker.lookup("a", bench.transfer(keys[:asked])) == [pages]
    bench.linker._groups = (None,)  # other ranks may have less, or holes
    assert bench.linker.lookup("b", bench.transfer(keys)) == list(range(1, pages + 1))
    bench.linker._groups = ()
    bench.linker.close()


def test_a_queued_load_can_be_let_go() -> None:
    bench, keys = Bench("mha", MEMORY), keys_of(1, 8)
    bench.store(keys)
    arena = bench.linker._store.pipeline.arena
    slots = bench.allocator.alloc(8 * PAGE)
    assert bench.linker.load("a", bench.transfer(keys, slots))
    assert bench.linker.cancel_queued_load("a")
    assert not bench.linker.cancel_queued_load("a")
    assert bench.linker.start_layer_wise_loading() == -1
    bench.linker.reset()
    bench.linker._store.pipeline.clear()
    assert arena.leases == 0
    bench.linker.close()


def test_damage_in_memory_is_never_placed() -> None:
    bench, keys = Bench("mha", MEMORY), keys_of(1, 4)
    bench.store(keys)
    kept = bench.linker._store.pipeline.tiers["hot"].tier._index.get(bytes.fromhex(keys[2])).place
    kept.lease.view[kept.header.frames[1].offset] ^= 1
    slots = bench.allocator.alloc(4 * PAGE)
    assert bench.linker.load("a", bench.transfer(keys, slots))
    assert not bench.linker.finish_layer_wise_loading(bench.linker.start_layer_wise_loading())
    assert bench.linker.lookup("b", bench.transfer(keys[:3])) == [2]
    bench.linker.close()


def loads(rounds: int) -> tuple[int, int]:
    """Loads out of a store that damages and delays 5 % of its reads, while memory is too small for
    all: how many were promised, and how many the linker then would not begin."""
    more = {"budget.arena": "4 MiB", "tiers.cold.fails": 1_000_000}
    bench = Bench("mha", AWKWARD | over("400 KiB", **more))
    prompts = [keys_of(s, 6) for s in range(12)]
    contents = [bench.store(keys, whole=False) for keys in prompts]
    runner = bench.linker._store.pipeline._runners["store"]
    until(lambda: not runner.open)
    Mood.damage = Mood.late = 0.05
    Mood.delay = 0.4
    promised = refused = 0
    for i in range(rounds):
        keys, content = prompts[i * 5 % 12], contents[i * 5 % 12]
        found = sum(bench.linker.lookup(f"r{i}", bench.transfer(keys)))
        if not found:
            time.sleep(0.001)
            continue
        promised += 1
        got = bench.load(f"r{i}", keys[:found])  # which fails where SGLang would answer with 503
        refused += got is None
        assert got is None or all(
            torch.equal(g, c[: found * PAGE]) for g, c in zip(got, content, strict=True)
        )
    bench.linker.close()
    return promised, refused


def test_no_promise_is_broken() -> None:
    promised, refused = loads(300)
    assert promised > refused


@pytest.mark.campaign
@pytest.mark.timeout(3000)
def test_no_promise_is_broken_at_length() -> None:
    promised, _ = loads(40_000)
    assert promised > 10_000


def test_another_sglang_is_said_and_served(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A method that a later SGLang wants: the linker is off, the engine is not."""
    import importlib

    import tierloom.adapters.sglang.linker as module

    base = unified_cache_linker.UnifiedCacheLinker
    later = type("UnifiedCacheLinker", (base,), {"promote": abstract()})
    monkeypatch.setattr(unified_cache_linker, "UnifiedCacheLinker", later)
    try:
        importlib.reload(module)
        bench, keys = Bench("mha", MEMORY), keys_of(1, 4)
        assert "promote" in caplog.text
        slots = bench.allocator.alloc(4 * PAGE)
        assert bench.linker.lookup("a", bench.transfer(keys)) == []
        assert not bench.linker.load("a", bench.transfer(keys, slots))
        assert not bench.linker.offload(bench.transfer(keys, slots))
        bench.linker.reset()
        bench.linker.close()
    finally:
        monkeypatch.undo()
        importlib.reload(module)


def abstract() -> Any:
    import abc

    @abc.abstractmethod
    def promote(self: Any) -> None: ...

    return promote


def test_states_are_refused_by_name(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench("mha", MEMORY, {ComponentType.FULL, ComponentType.MAMBA})
    assert "MAMBA" in caplog.text
    assert bench.linker.lookup("a", bench.transfer(keys_of(1, 3))) == []
    bench.linker.close()


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="capacity"):
        Bench("mha", MEMORY | {"tiers.hot.capcity": "1 GiB"})


def test_a_pipeline_without_memory_is_refused(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    disk = {
        "use": "disk", "path": str(tmp_path), "capacity": "64 MiB", "segment": "16 MiB",
        "keep_free": "1 MiB",
    }  # fmt: skip
    only_disk = AWKWARD | over()
    only_disk["tierloom.config"]["tiers"] = {"warm": disk}
    stages = only_disk["tierloom.config"]["graphs"]
    stages["store"]["stages"]["out"] = {"use": "put", "tier": "warm"}
    del stages["store"]["stages"]["hot"], stages["store"]["stages"]["cold"]
    stages["retrieve"]["stages"]["plan"] = {"use": "lookup"}
    stages["retrieve"]["stages"]["fetch"] = {"use": "get"}
    bench = Bench("mha", only_disk)
    assert "no memory tier" in caplog.text
    assert bench.linker.lookup("a", bench.transfer(keys_of(1, 2))) == []
    bench.linker.close()


def test_two_threads(tmp_path: Path) -> None:
    """The scheduler asks and loads while stores end and the disk is read."""
    bench = Bench("mha", disk(tmp_path))
    prompts = [keys_of(s, 6) for s in range(6)]
    contents = [bench.store(keys) for keys in prompts]
    wrong: list[BaseException] = []

    def ask() -> None:
        try:
            for i in range(200):
                bench.linker.lookup(f"x{i}", bench.transfer(prompts[i % 6]))
        except BaseException as error:
            wrong.append(error)

    other = threading.Thread(target=ask)
    other.start()
    for i in range(40):
        assert same(bench.load(f"l{i}", prompts[i % 6]), contents[i % 6])
    other.join(30)
    assert not wrong
    bench.linker.close()
