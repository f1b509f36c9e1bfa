"""How the connector reads vLLM's tensors, without an engine: run by vLLM's own Python.

Prints the names of the cases that held. The cache is memory that nobody may write: whoever does
ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
from types import SimpleNamespace as Bag
from typing import Any

import torch
from vllm import _custom_ops as ops

from tierloom.adapters.vllm.exchange.settings import configured
from tierloom.adapters.vllm.worker import layout as vllm_layout, side as vllm_worker
from tierloom.stages.errors import ConfigError, LayoutError, TierDown
from tierloom.stages.kv.layout import KVLayout

BLOCKS, HEADS, SIZE, CONTENT = 6, 2, 32, 128


def read_only(layers: int, *, together: bool) -> list[torch.Tensor]:
    """[blocks, heads, tokens, content] of each layer; `together`: side by side in each block."""
    shape = (BLOCKS, HEADS, SIZE, CONTENT)
    elements = BLOCKS * HEADS * SIZE * CONTENT
    held = mmap.mmap(-1, layers * elements * 2)
    raw = torch.frombuffer(held, dtype=torch.bfloat16)
    assert not ctypes.CDLL(None).mprotect(
        ctypes.c_void_p(raw.data_ptr()), len(held), mmap.PROT_READ
    )
    if together:
        return list(raw.view(BLOCKS, layers, *shape[1:]).unbind(1))
    return list(raw.view(layers, *shape).unbind(0))


def probe(caches: list[torch.Tensor]) -> None:
    layout = KVLayout.from_tensors(caches, order="BHNC-KT")
    vllm_layout._probe_cpu(caches[0], layout, "vec")


def the_layout_of_cpu_attention_is_proved_in_memory_of_our_own() -> None:
    for together in (False, True):
        probe(read_only(3, together=together))


def the_operation_is_given_memory_laid_out_as_the_engines() -> None:
    seen: list[tuple[int, ...]] = []
    real = ops.cpu_attn_reshape_and_cache

    def watched(k: Any, v: Any, keys: torch.Tensor, *rest: Any) -> None:
        seen.append(keys.stride())
        real(k, v, keys, *rest)

    ops.cpu_attn_reshape_and_cache = watched
    try:
        caches = read_only(3, together=True)
        probe(caches)
    finally:
        ops.cpu_attn_reshape_and_cache = real
    halves = caches[0].view(BLOCKS, HEADS, 2 * SIZE, CONTENT // 2).chunk(2, dim=2)
    assert seen == [halves[0].stride()], seen


def another_layout_of_cpu_attention_is_found_out() -> None:
    real = ops.cpu_attn_reshape_and_cache

    def other(k: Any, v: Any, keys: Any, values: Any, slots: Any, isa: str) -> None:
        real(v, k, keys, values, slots, isa)

    ops.cpu_attn_reshape_and_cache = other
    said = ""
    try:
        probe(read_only(1, together=False))
    except LayoutError as error:
        said = str(error)
    finally:
        ops.cpu_attn_reshape_and_cache = real
    assert "no longer lays out a block as BHNC-KT" in said


def registered(error: Exception) -> Any:
    """A worker whose pipelines cannot be opened."""
    engine: Any = Bag(parallel_config=None, kv_transfer_config=Bag(engine_id="none"))
    worker: Any = vllm_worker.WorkerSide(engine, None, configured({}))

    def refuses(*_: Any) -> Any:
        raise error

    kept = vllm_worker.open_pipelines, vllm_worker.vllm_rank
    vllm_worker.open_pipelines, vllm_worker.vllm_rank = refuses, lambda _: Bag(index=0)
    try:
        worker.register_kv_caches({})
    finally:
        vllm_worker.open_pipelines, vllm_worker.vllm_rank = kept
    return worker


def nothing_but_the_users_own_mistake_keeps_vllm_from_starting() -> None:
    for error in (
        LayoutError("page-locking host memory failed: code 2"),
        OSError(12, "Cannot allocate memory"),
        TierDown("no answer"),
        MemoryError(),
    ):
        worker = registered(error)
        assert worker.pipelines == []
        assert worker.build_connector_worker_meta().by_worker[0].info.off == (
            str(error) or repr(error)
        )
    try:
        registered(ConfigError("unknown key"))
    except ConfigError:
        return
    raise AssertionError("a mistake in the settings was passed over")


CASES = [
    the_layout_of_cpu_attention_is_proved_in_memory_of_our_own,
    the_operation_is_given_memory_laid_out_as_the_engines,
    another_layout_of_cpu_attention_is_found_out,
    nothing_but_the_users_own_mistake_keeps_vllm_from_starting,
]

if __name__ == "__main__":
    for case in CASES:
        case()
        print(case.__name__, flush=True)
