"""LMCache and tierloom, each over the same made-up KV and the same kind of place.

Run as a process of its own, `python -m peer.subjects NAME PLACE ADDRESS TOKENS`, it reads
`store N`, `retrieve N` or `forget N` from stdin, and answers each with a line of JSON: seconds of
wall clock and CPU, and what was wrong, if anything was.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

import numpy as np
import torch

from tierloom.adapters.made_up.kv_groups import kv_groups
from tierloom.adapters.made_up.made_up_kv import MadeUpKV

BLOCK, ROOM = 16, 3
"""Tokens of the engine's block; prompts that a place of the subject's own holds."""
SHAPE = "(2,{blocks},16,8,128):bfloat16:32"
"""Llama-3.1-8B."""
_PATIENCE = 60.0


class Subject:
    """Prompts by number, over caches whose blocks are shuffled."""

    def __init__(self, tokens: int) -> None:
        (group,) = kv_groups(SHAPE.format(blocks=tokens // BLOCK))
        self.kv, self.tokens = MadeUpKV(group, seed=7), tokens
        self.nbytes = tokens * group.token_bytes
        order = np.random.default_rng(7).permutation(group.blocks)
        self.slots = (order[:, None] * BLOCK + np.arange(BLOCK)).ravel().astype(np.int64)

    def store(self, number: int) -> str:
        """Return when everything is where it is to be kept; what is wrong, if anything is."""
        raise NotImplementedError

    def missing(self, number: int) -> str:
        """After a store: what of it is not there; not timed."""
        return ""

    def retrieve(self, number: int) -> str:
        raise NotImplementedError

    def forget(self, number: int) -> str:
        raise NotImplementedError

    def run(self, word: str, number: int) -> dict[str, Any]:
        """One command, timed without what only the benchmark needs."""
        if word == "store":
            self.kv.fill(number)
        elif word == "retrieve":
            self.kv.blank()
        wall, cpu = time.perf_counter(), time.process_time()
        wrong = getattr(self, word)(number)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if word == "retrieve" and not wrong:
            wrong = self.kv.difference(number, self.tokens)
        if word == "store" and not wrong:
            wrong = self.missing(number)
        return {"wall": wall, "cpu": cpu, "bytes": self.nbytes, "wrong": wrong}


class Tierloom(Subject):
    """One tier, and nothing else."""

    def __init__(self, place: str, address: str, tokens: int) -> None:
        import tierloom

        super().__init__(tokens)
        room = ROOM * (self.nbytes + tokens // 256 * 4096)
        tier = {
            "memory": {"use": "memory", "capacity": room},
            "disk": {"use": "disk", "path": f"{address}/ours", "capacity": room + (64 << 20),
                     "segment": room // 3},
            "redis": {"use": "redis", "url": address},
            "server": {"use": "server", "url": address},
        }[place]  # fmt: skip
        stages = {"keys": {"use": "hash"}, "fresh": {"use": "lookup", "want": "absent"},
                  "pack": {"use": "gather"}, "put": {"use": "put", "tier": "it"}}  # fmt: skip
        back = {"keys": {"use": "hash"}, "plan": {"use": "lookup"}, "fetch": {"use": "get"},
                "grow": {"use": "decode"}, "place": {"use": "scatter"}}  # fmt: skip
        self._pipe = tierloom.open(
            {"version": 1, "name": "peer", "tiers": {"it": {**tier, "timeout": "60 s"}},
             "graphs": {"store": {"deadline": "60 s", "stages": stages},
                        "retrieve": {"deadline": "60 s", "stages": back}}},
            layout=self.kv.layout, model="peer",
        )  # fmt: skip

    def _done(self, graph: str, number: int) -> str:
        ids = self.kv.tokens(number, self.tokens)
        receipt = getattr(self._pipe, graph)(ids, self.kv.caches, self.slots).wait()
        return "" if receipt.tokens == self.tokens else f"{graph}: {receipt}"

    def store(self, number: int) -> str:
        return self._done("store", number)

    def retrieve(self, number: int) -> str:
        return self._done("retrieve", number)

    def forget(self, number: int) -> str:
        self._pipe.clear()
        return ""


class LMCache(Subject):
    """Its engine of version 0.5.6. It has no connector for paged memory of a CPU, so it is given
    one that calls its own copy of that (`multi_layer_kv_transfer`), a chunk at a time."""

    def __init__(self, place: str, address: str, tokens: int) -> None:
        from lmcache.utils import mock_up_broadcast_fn, mock_up_broadcast_object_fn
        from lmcache.v1.cache_engine import LMCacheEngineBuilder
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.metadata import LMCacheMetadata

        super().__init__(tokens)
        group, gib = self.kv.group, self.nbytes / (1 << 30)
        options: dict[str, Any] = {
            "chunk_size": 256, "local_cpu": place == "memory",
            "max_local_cpu_size": ROOM * gib + 0.3, "save_unfull_chunk": True,
        }  # fmt: skip
        if place == "disk":
            options |= {
                "local_disk": f"file://{address}/theirs/", "max_local_disk_size": ROOM * gib + 1,
                "extra_config": {"use_odirect": True},
            }  # fmt: skip
        elif place != "memory":
            options |= {"remote_url": address, "remote_serde": "naive"}
        config = LMCacheEngineConfig.from_defaults(**options)
        metadata = LMCacheMetadata(
            model_name="peer", world_size=1, local_world_size=1, worker_id=0, local_worker_id=0,
            kv_dtype=torch.bfloat16, kv_shape=(group.layers, 2, 256, group.heads, group.dim),
        )  # fmt: skip
        self._slots = torch.from_numpy(self.slots)
        flat = [c.view(2, tokens, group.heads * group.dim) for c in self.kv.caches]
        self._engine = LMCacheEngineBuilder.get_or_create(
            "peer", config, metadata, _connector(flat, self._slots, group), mock_up_broadcast_fn,
            mock_up_broadcast_object_fn,
        )  # fmt: skip
        self._engine.post_init(kvcaches=self.kv.caches)
        self._where = {"memory": "LocalCPUBackend", "disk": "LocalDiskBackend"}.get(
            place, "RemoteBackend"
        )
        self._backend = self._engine.storage_manager.storage_backends[self._where]
        self._tell = threading.Event()
        """Set when a batch of puts has ended, of which LMCache itself keeps no account."""
        if place not in ("memory", "disk"):
            told = self._backend.batched_put_callback

            def ended(future: Any, keys: Any) -> None:
                told(future, keys)
                self._tell.set()

            self._backend.batched_put_callback = ended

    def store(self, number: int) -> str:
        """Puts go on in the background: waits for them without asking the store, which would be
        work of the benchmark's own."""
        ids = torch.from_numpy(self.kv.tokens(number, self.tokens))
        self._tell.clear()
        self._engine.store(ids, kvcaches=self.kv.caches, slot_mapping=self._slots)
        if self._where == "RemoteBackend" and self._backend.connection.support_batched_put():
            return "" if self._tell.wait(_PATIENCE) else "store: it does not end"
        work = getattr(self._backend, "disk_worker", self._backend)
        end = time.monotonic() + _PATIENCE
        while getattr(work, "put_tasks", ()):
            if time.monotonic() > end:
                return "store: it does not end"
            time.sleep(0.002)
        return ""

    def missing(self, number: int) -> str:
        ids = torch.from_numpy(self.kv.tokens(number, self.tokens))
        there = self._engine.lookup(ids, search_range=[self._where])
        return "" if there == self.tokens else f"store: {there} of {self.tokens} tokens are there"

    def retrieve(self, number: int) -> str:
        ids = torch.from_numpy(self.kv.tokens(number, self.tokens))
        mask = self._engine.retrieve(ids, kvcaches=self.kv.caches, slot_mapping=self._slots)
        return "" if int(mask.sum()) == self.tokens else f"retrieve: {int(mask.sum())} tokens"

    def forget(self, number: int) -> str:
        self._engine.clear()
        return ""


def _connector(flat: list[torch.Tensor], slots: torch.Tensor, group: Any) -> Any:
    """`flat`: [2, slots, heads x dim] of each layer."""
    from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface
    from lmcache.v1.platform.torch_ops import mem_kernels

    ways, formats = mem_kernels.TransferDirection, mem_kernels.EngineKVFormat

    class Paged(GPUConnectorInterface):  # type: ignore[misc, unused-ignore]
        def _move(self, memory_obj: Any, start: int, end: int, way: Any) -> None:
            mem_kernels.multi_layer_kv_transfer(
                memory_obj.tensor, flat, slots[start:end], torch.device("cpu"), flat[0].shape[1],
                way, formats.NL_X_TWO_NB_BS_NH_HS, block_size=BLOCK, head_size=group.dim,
            )  # fmt: skip

        def to_gpu(self, memory_obj: Any, start: int, end: int, **_: Any) -> None:
            self._move(memory_obj, start, end, ways.H2D)

        def from_gpu(self, memory_obj: Any, start: int, end: int, **_: Any) -> None:
            self._move(memory_obj, start, end, ways.D2H)

        def batched_to_gpu(self, objs: Any, starts: Any, ends: Any, **_: Any) -> None:
            for each in zip(objs, starts, ends, strict=True):
                self.to_gpu(*each)

        def batched_from_gpu(self, objs: Any, starts: Any, ends: Any, **_: Any) -> None:
            for each in zip(objs, starts, ends, strict=True):
                self.from_gpu(*each)

        def get_shape(self, num_tokens: int) -> torch.Size:
            return torch.Size([2, len(flat), num_tokens, flat[0].shape[2]])

    return Paged()


SUBJECTS: dict[str, type[Any]] = {"LMCache": LMCache, "tierloom": Tierloom}


def main() -> None:
    name, place, address, tokens = sys.argv[1:]
    out, sys.stdout = sys.stdout, sys.stderr  # LMCache logs to stdout
    torch.set_num_threads(1)
    subject = SUBJECTS[name](place, address, int(tokens))
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        word, number = line.split()
        print(json.dumps(subject.run(word, int(number))), file=out, flush=True)


if __name__ == "__main__":
    main()
