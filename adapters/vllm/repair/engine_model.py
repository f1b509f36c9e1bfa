"""The engine's own model, found among the modules of this process, or why none may be repaired.

vLLM hands a connector no model. Of all live modules, the one that can compute logits and owns
every attention layer of the KV is the one that its runner calls.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from tierloom.adapters.vllm.exchange.identity import draft_model
from tierloom.stages.errors import LayoutError

_PLAIN_KV = {"auto", "bfloat16", "float16", "float32"}
"""Types of KV cache whose numbers are the model's own."""


class EngineModel(NamedTuple):
    """What a repair calls. Holds no memory of its own."""

    module: torch.nn.Module
    layers: dict[str, Any]
    """vLLM's attention layers by name, in model order."""
    rotary: tuple[Any, ...]
    """The rotary module of each layer; None: it has none."""
    device: torch.device


def find_model(vllm_config: Any, kv_cache_config: Any, groups: Sequence[Any]) -> EngineModel:
    """The model whose attention fills `groups`, this worker's KV groups (`CacheGroup`).

    Walks through all live objects, which takes seconds: call it once, where vLLM registers its KV
    caches. Later vLLM freezes what is alive, and the collector shows it no more.
    Raises LayoutError with the reason why this engine's KV is not repaired.
    """
    if reasons := list(_reasons(vllm_config, kv_cache_config, groups)):
        raise LayoutError("prompts are not blended: " + "; ".join(reasons))
    known = vllm_config.compilation_config.static_forward_context
    layers = {name: known[name] for name in groups[0].names}
    module = _owner(list(layers.values()))
    rotary = _rotary(module, list(layers.values()))
    if not any(rotary):
        raise LayoutError(
            f"prompts are not blended: {type(module).__name__} has no rotary embedding that vLLM "
            "keeps a table of, so its K cannot be moved to another place"
        )
    return EngineModel(module, layers, rotary, next(module.parameters()).device)


def _reasons(vllm_config: Any, kv_cache_config: Any, groups: Sequence[Any]) -> Iterator[str]:
    """Each way of running in which a repair of its own would be wrong, or would hang."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    for name in (
        "pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size",
    ):  # fmt: skip
        if (size := getattr(parallel, name, 1) or 1) > 1:
            yield f"{name} is {size}: a worker cannot compute a token by itself"
    if parallel.data_parallel_size > 1 and parallel.is_moe_model is not False:
        yield "experts are shared by data-parallel ranks, which would have to repair in step"
    if parallel.use_ubatching:
        yield "each half of a batch runs by itself (dual batch overlap)"
    if getattr(vllm_config.compilation_config.pass_config, "enable_sp", False):
        yield "sequence parallelism wants batches of other sizes than a repair has"
    if vllm_config.lora_config is not None:
        yield "adapters (LoRA) are on, and which token has which is told to a batch of vLLM's only"
    if draft_model(vllm_config) is not None:
        yield "a draft model keeps its KV beside the model's own"
    if model.uses_mrope or getattr(model, "uses_xdrope_dim", 0):
        yield "its positions have several dimensions (M-RoPE)"
    if model.is_multimodal_model or model.is_encoder_decoder or model.enable_prompt_embeds:
        yield "it is called with embeddings, not with the ids of tokens"
    yield from _kv_reasons(vllm_config, kv_cache_config, groups)


def _kv_reasons(vllm_config: Any, kv_cache_config: Any, groups: Sequence[Any]) -> Iterator[str]:
    """What of its KV stands against it."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    if len(kv_cache_config.kv_cache_groups) > 1 or groups[0].window:
        yield (
            "it has several KV cache groups, or one that frees the blocks before its window: where "
            "windows are the cause, --disable-hybrid-kv-cache-manager keeps them"
        )
        return
    group = groups[0]
    if (dtype := str(vllm_config.cache_config.cache_dtype)) not in _PLAIN_KV:
        yield f"its KV cache is {dtype}, in which K cannot be turned"
    known = vllm_config.compilation_config.static_forward_context
    for name, layer in known.items():
        if not isinstance(layer, AttentionLayerBase):
            continue
        if not isinstance(layer, Attention) or layer.attn_type != "decoder":
            yield f"{name} is {type(layer).__name__}, not attention over a prompt's K and V"
        elif name not in group.names:
            yield f"{name} has no KV of its own"
        elif layer.get_attn_backend().get_builder_cls().requires_block_table_width:
            yield f"{name} is computed by several attention backends at once"
        else:
            continue
        return  # the others are most often as that one
    if group.opaque or group.layout.kv != 2:
        yield f"where {group.backend} keeps K and V is not known"


def _owner(layers: list[Any]) -> torch.nn.Module:
    """The smallest live module that has `compute_logits` and owns all of `layers`."""
    wanted = {id(layer) for layer in layers}
    found: list[tuple[set[int], torch.nn.Module]] = []
    for one in gc.get_objects():
        kind = type(one)  # not isinstance: proxies of other libraries would import what they name
        if issubclass(kind, torch.nn.Module) and hasattr(kind, "compute_logits"):
            inside = {id(module) for module in one.modules()}
            if wanted <= inside:
                found.append((inside, one))
    found.sort(key=lambda owner: len(owner[0]))
    if not found or any(not found[0][0] <= inside for inside, _ in found[1:]):
        raise LayoutError(
            f"prompts are not blended: {len(found)} live modules own all {len(layers)} attention "
            "layers and can compute logits, where one was expected"
        )
    return found[0][1]


def _rotary(module: torch.nn.Module, layers: list[Any]) -> tuple[Any, ...]:
    """Of each layer, the module with a table of cosines and sines that is nearest to it and no
    other layer's."""
    above = {id(child): parent for parent in module.modules() for child in parent.children()}
    every = {id(layer) for layer in layers}
    out: list[Any] = []
    for layer in layers:
        near, tables = above[id(layer)], {}
        while len(every & {id(m) for m in near.modules()}) == 1:
            tables = {id(m): m for m in near.modules() if hasattr(m, "cos_sin_cache")}
            if tables or id(near) not in above:
                break
            near = above[id(near)]
        if len(tables) > 1:
            raise LayoutError(
                f"prompts are not blended: {layer.layer_name} has {len(tables)} rotary modules"
            )
        out.append(next(iter(tables.values()), None))
    return tuple(out)
