"""SGLang's storage backend and linker without an engine: CPU per GB, and how long its threads wait.

    SGLANG_USE_CPU_ENGINE=1 OMP_NUM_THREADS=1 .venv-sglang/bin/python benchmarks/sglang_hicache.py

Real classes of SGLang's: host pools with pages of SmolLM2 (30 layers, 3 heads of 64, float32, 32
tokens), and its `file` backend on tmpfs as the yardstick, in rounds that take turns. Writes JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", "")

import anyio
import torch
from sglang.srt import runtime_context
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheFile,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.utils import get_hash_str
from sglang.srt.server_args import ServerArgs

from tierloom.adapters.sglang.hicache import TierloomHiCache
from tierloom.adapters.sglang.linker import TierloomLinker
from tierloom.stages.tiers.contract.index import FOREVER, Entry
from tierloom.stages.tiers.wrappers.mock import Mock

PAGE, LAYERS, HEADS, DIM, BATCH = 32, 30, 3, 64, 128
KEPT = 100_000
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256,
    "hidden_size": 192, "intermediate_size": 64, "num_hidden_layers": LAYERS,
    "num_attention_heads": 3, "num_key_value_heads": HEADS, "head_dim": DIM,
    "max_position_embeddings": 65536, "rope_theta": 10000.0,
}  # fmt: skip


def settings(**more: Any) -> dict[str, Any]:
    return {
        "backend_name": "tierloom", "module_path": "x", "class_name": "x", "interface_v1": 1,
        "tierloom.config": "minimal", "budget.arena": "1 GiB",
    } | more  # fmt: skip


def storage_config(extra: dict[str, Any]) -> Any:
    return HiCacheStorageConfig(
        tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1,
        is_mla_model=False, enable_storage_metrics=False, is_page_first_layout=False,
        model_name="m", extra_config=extra,
    )  # fmt: skip


def host_pool(slots: int) -> Any:
    device = MHATokenToKVPool(PAGE, PAGE, torch.float32, HEADS, DIM, LAYERS, "cpu", False)
    info = device.get_device_pool_infos()[0].buffer_info
    return MHATokenToKVPoolHost(
        info, slots / PAGE, 0, PAGE, "layer_first", pin_memory=False,
        device_capacity_tokens=PAGE, start_layer=0, end_layer=LAYERS - 1,
    )  # fmt: skip


def backend(host: Any, extra: dict[str, Any]) -> TierloomHiCache:
    made = TierloomHiCache(storage_config(extra))
    made.register_mem_pool_host(host)
    made.on_host_pools_registered()
    assert not made.off, made.off
    return made


def keys_of(seed: int, pages: int) -> list[str]:
    return list(get_hash_str([(seed * 7919 + i) % 50_000 for i in range(pages * PAGE)], None, PAGE))


class Ours:
    def __init__(self, host: Any) -> None:
        self.storage = backend(host, settings(**{"tiers.hot.capacity": "1400 MiB"}))

    def set(self, keys: list[str], slots: torch.Tensor, prefix: list[str]) -> None:
        assert all(self.storage.batch_set_v1(keys, slots, HiCacheStorageExtraInfo(prefix)))
        runner = self.storage._store.pipeline._runners["store"]
        while runner.open:
            time.sleep(0.0002)

    def get(self, keys: list[str], slots: torch.Tensor, prefix: list[str]) -> None:
        assert all(self.storage.batch_get_v1(keys, slots, HiCacheStorageExtraInfo(prefix)))

    def clear(self) -> None:
        self.storage.clear()


class Theirs:
    """SGLang's `file` backend, as its controller calls it: a page at a time."""

    def __init__(self, host: Any, folder: Path) -> None:
        self.host, self.folder = host, folder
        self.storage = HiCacheFile(storage_config({}), str(folder))

    def set(self, keys: list[str], slots: torch.Tensor, _: list[str]) -> None:
        pages = [self.host.get_data_page(slots[i * PAGE]) for i in range(len(keys))]
        assert self.storage.batch_set(keys, pages)

    def get(self, keys: list[str], slots: torch.Tensor, _: list[str]) -> None:
        blank = [self.host.get_dummy_flat_data_page() for _ in keys]
        for i, page in enumerate(self.storage.batch_get(keys, blank)):
            assert page is not None
            self.host.set_from_flat_data_page(slots[i * PAGE], page)

    def clear(self) -> None:
        self.storage.clear()


def per_gb(rounds: int, folder: Path) -> dict[str, Any]:
    """CPU s/GB of set and get; of ours every thread counts."""
    host = host_pool(5 * BATCH * PAGE)
    host.kv_buffer.normal_()
    keys = keys_of(1, 4 * BATCH)
    slots = host.alloc(4 * BATCH * PAGE)
    nbytes = 4 * BATCH * host.size_per_token * PAGE
    sides = {"tierloom": Ours(host), "file": Theirs(host, folder)}
    took: dict[str, list[float]] = {f"{s}_{a}": [] for s in sides for a in ("set", "get")}
    for i in range(rounds + 1):
        for name in list(sides)[:: 1 if i % 2 else -1]:
            side = sides[name]
            side.clear()
            for act in ("set", "get"):
                began = time.process_time()
                for b in range(4):
                    part = slice(b * BATCH, (b + 1) * BATCH)
                    where = slots[b * BATCH * PAGE : (b + 1) * BATCH * PAGE]
                    getattr(side, act)(keys[part], where, keys[: b * BATCH])
                if i:
                    took[f"{name}_{act}"].append((time.process_time() - began) / nbytes * 1e9)
    copy = []
    for _ in range(5):
        target = torch.empty_like(host.kv_buffer[0])
        target.copy_(host.kv_buffer[0])
        began = time.process_time()
        target.copy_(host.kv_buffer[0])
        copy.append((time.process_time() - began) / target.nbytes * 1e9)
    found = {name: round(statistics.median(all_), 4) for name, all_ in took.items()}
    sides["tierloom"].storage.close()
    return found | {
        "memcpy": round(statistics.median(copy), 4), "gb_each": round(nbytes * rounds / 1e9, 2),
        "set_of_file": round(found["tierloom_set"] / found["file_set"], 3),
        "get_of_file": round(found["tierloom_get"] / found["file_get"], 3),
    }  # fmt: skip


def crowd(storage: Any, chunk: int) -> None:
    """100,000 objects more in the index."""
    index = storage._store.pipeline.tiers["hot"].tier._index
    source = random.Random(1)
    for _ in range(KEPT):
        links = source.randbytes(32 * chunk)
        index.add(Entry(links[-32:], links, 1, None, FOREVER))


def percentiles(took: list[float]) -> dict[str, float]:
    took = sorted(took)
    at = {"p50": len(took) // 2, "p99": len(took) * 99 // 100, "max": -1}
    return {name: round(took[i] * 1e6, 1) for name, i in at.items()}


def exists(calls: int) -> dict[str, float]:
    host = host_pool(2 * BATCH * PAGE)
    storage = backend(host, settings(**{"tiers.hot.capacity": "400 MiB"}))
    keys, slots = keys_of(2, BATCH), host.alloc(BATCH * PAGE)
    storage.batch_set_v1(keys, slots, HiCacheStorageExtraInfo([]))
    while storage.batch_exists(keys) < BATCH:
        time.sleep(0.001)
    crowd(storage, 8)
    gc.freeze()  # as SGLang does once it is warm
    took = []
    for _ in range(calls):
        began = time.perf_counter()
        found = storage.batch_exists(keys)
        took.append(time.perf_counter() - began)
        assert found == BATCH
    return percentiles(took)


def lookups(calls: int) -> dict[str, float]:
    """The linker on the scheduler's thread: 1,024 pages, all in memory."""
    pool = MHATokenToKVPool(64, PAGE, torch.float32, 1, 8, 2, "cpu", False)
    params = SimpleNamespace(
        page_size=PAGE,
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        attn_cp_cache_group=None,
        attn_tp_cache_group=None,
        tp_cache_group=None,
    )
    linker = TierloomLinker(
        runtime_context.get_server_args(), params, extra_config={
            "tierloom.config": "minimal", "tiers.hot.capacity": "64 MiB", "budget.arena": "8 MiB",
        },
    )  # fmt: skip
    assert not linker.off, linker.off
    crowd(linker, 1)
    linker._memory.update(keys_of(3, 1024))
    gc.freeze()
    took = []
    for i in range(calls):
        fresh = PoolTransfer(PoolName.KV, keys=keys_of(3, 1024) if i % 64 == 0 else None)
        if fresh.keys:
            last = fresh
        again = PoolTransfer(PoolName.KV, keys=[bytes.fromhex(k).hex() for k in last.keys])
        began = time.perf_counter()
        found = linker.lookup(f"r{i}", [again])
        took.append(time.perf_counter() - began)
        assert found == [1024]
    return percentiles(took)


class Stuck(Mock):
    """A store that stops answering."""

    hangs = False

    async def size(self, name: str) -> int:
        if self.hangs:
            await anyio.sleep(3600)
        return await super().size(name)

    async def get_value(self, name: str) -> bytearray | None:
        if self.hangs:
            await anyio.sleep(3600)
        return await super().get_value(name)


def over_stuck(fails: int, timeout: str) -> dict[str, Any]:
    """A pipeline over nothing else, whose reads may take 200 ms."""
    store = {
        "keys": {"use": "hash"}, "fresh": {"use": "lookup", "want": "absent"},
        "pack": {"use": "gather"}, "cold": {"use": "put", "tier": "cold"},
    }  # fmt: skip
    retrieve = {
        "keys": {"use": "hash"}, "plan": {"use": "lookup"}, "fetch": {"use": "get"},
        "grow": {"use": "decode"}, "place": {"use": "scatter"},
    }  # fmt: skip
    cold = {
        "use": "sglang_hicache:Stuck", "latency": "1 ms", "fails": fails, "timeout": timeout,
        "probe": "1 h",
    }  # fmt: skip
    pipeline = {
        "version": 1, "name": "stuck", "tiers": {"cold": cold},
        "graphs": {"store": {"stages": store},
                   "retrieve": {"deadline": "200 ms", "stages": retrieve}},
    }  # fmt: skip
    return settings(**{"tierloom.config": pipeline, "tierloom.wait": "200 ms"})


def stuck(calls: int) -> dict[str, float]:
    """A tier that answers no more: how late calls come back, and what they cost once its breaker is
    open."""
    import sglang_hicache  # as the pipeline imports it

    host = host_pool(2 * BATCH * PAGE)
    keys, slots = keys_of(4, BATCH), host.alloc(BATCH * PAGE)
    storage = backend(host, over_stuck(1_000_000, "10 s"))
    storage.batch_set_v1(keys, slots, HiCacheStorageExtraInfo([]))
    while storage.batch_exists(keys) < BATCH:
        time.sleep(0.01)
    sglang_hicache.Stuck.hangs = True
    late = []
    for _ in range(calls):
        for act in (lambda: storage.batch_exists(keys), lambda: storage.batch_get_v1(keys, slots)):
            began = time.perf_counter()
            act()
            late.append(time.perf_counter() - began - 0.2)
    storage.close()
    sglang_hicache.Stuck.hangs = False
    storage = backend(host, over_stuck(1, "300 ms"))
    sglang_hicache.Stuck.hangs = True
    tier = storage._store.pipeline.tiers["cold"]
    while tier.available:
        storage.batch_get_v1(keys, slots)
    spent = []
    for _ in range(calls):
        began = time.perf_counter()
        storage.batch_exists(keys)
        spent.append(time.perf_counter() - began)
    storage.close()
    return {
        "calls": len(late), "after_deadline_ms_max": round(max(late) * 1e3, 1),
        "after_deadline_ms_p50": round(statistics.median(late) * 1e3, 1),
        "with_open_breaker_us_max": round(max(spent) * 1e6, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", default="bench-sglang.json")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--calls", type=int, default=10_000)
    args = parser.parse_args()
    shared = Path("/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(dir=shared))
    try:
        (folder / "m").mkdir()
        (folder / "m" / "config.json").write_text(json.dumps(CONFIG))
        (folder / "m" / "model.safetensors").write_bytes(b"x" * 4096)
        runtime_context.publish(ServerArgs(model_path=str(folder / "m"), device="cpu"), role="b")
        alone = {"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1}
        ranks = runtime_context.get_parallel().override(**alone)
        with ranks, host_memory_budget_scope(4 << 30):
            found = {
                "cpu_s_per_gb": per_gb(args.rounds, folder / "files"),
                "batch_exists_128_keys_us": exists(args.calls),
                "linker_lookup_1024_pages_us": lookups(args.calls),
                "stuck_tier": stuck(100),
                "cpus": os.cpu_count(), "objects_kept": KEPT,
            }  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
