"""What the cases share: an engine in this process, and a repair of its first KV group."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engine import _replace_no_kernels
from vllm import LLM

from tierloom.adapters.vllm.repair.engine_model import EngineModel, find_model
from tierloom.adapters.vllm.repair.forward import Repair
from tierloom.adapters.vllm.worker.layout import CacheGroup, cache_groups

OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    "dtype": "float32",
    "block_size": 32,
    "max_model_len": 2048,
    "kv_cache_memory_bytes": 32 << 20,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
    "seed": 0,
}


class Engine:
    """A real vLLM engine whose worker is at hand. Use it as a context."""

    def __init__(self, model: Path | str, **options: Any) -> None:
        if "llvmlite.binding.ffi" in sys.modules:
            _replace_no_kernels()
        self.llm = LLM(str(model), **{**OPTIONS, **options})
        core = self.llm.llm_engine.engine_core.engine_core
        self.runner = core.model_executor.driver_worker.worker.model_runner
        gc.unfreeze()  # vLLM froze its model; a connector looks for it before that
        self.config, self.kv = self.runner.vllm_config, self.runner.kv_cache_config

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.runner
        gc.collect()

    @property
    def layers(self) -> dict[str, Any]:
        known: dict[str, Any] = self.config.compilation_config.static_forward_context
        return known

    def groups(self) -> list[CacheGroup]:
        return cache_groups({n: a.kv_cache for n, a in self.layers.items()}, self.kv, self.layers)

    def model(self) -> EngineModel:
        return find_model(self.config, self.kv, self.groups())

    def repair(self, kind: type[Repair] = Repair) -> Repair:
        group = self.groups()[0]
        return kind(self.model(), self.config, self.kv, group)

    def snapshot(self) -> list[torch.Tensor]:
        return [cache.clone() for cache in self.groups()[0].caches]

    def noise(self) -> None:
        """Other numbers in every row: what a repair leaves alone can be told."""
        for cache in self.groups()[0].caches:
            cache.normal_()

    def say(
        self, prompts: list[list[int]], between: Callable[[], None] | None = None
    ) -> list[list[int]]:
        """Greedy answers to prompts that run together; `between` is called after each step."""
        from vllm import SamplingParams

        how = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, detokenize=False)
        for i, ids in enumerate(prompts):
            self.llm.llm_engine.add_request(str(i), {"prompt_token_ids": ids}, how)
        out: dict[int, list[int]] = {}
        while len(out) < len(prompts):
            for done in self.llm.llm_engine.step():
                if done.finished:  # vLLM gives requests names of its own behind ours
                    out[int(done.request_id.split("-")[0])] = list(done.outputs[0].token_ids)
            if between is not None:
                between()
        return [out[i] for i in range(len(prompts))]
