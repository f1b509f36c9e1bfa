"""A worker's pipelines, one for each KV group, and what the scheduler must know of them.

Each rank stores its part of the model's KV, named by the layers and heads it holds. The chain of
keys is the whole model's, so that the scheduler hashes a prompt once, whoever holds what.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tierloom.adapters.engine.http_option import http_url
from tierloom.adapters.engine.pipeline_parts import (
    asked_tiers,
    keeps_content,
    lookup_node,
    own_paths,
    own_ports,
)
from tierloom.adapters.engine.rank import Rank
from tierloom.adapters.model_identity.config import rope_text
from tierloom.adapters.model_identity.shared import SharedIdentity, shared_rope
from tierloom.adapters.vllm.exchange.identity import calibrated_id, shared_identity, weights_id
from tierloom.adapters.vllm.exchange.messages import WorkerInfo
from tierloom.adapters.vllm.exchange.settings import Configured
from tierloom.adapters.vllm.worker.layout import CacheGroup, cache_groups
from tierloom.pipeline.pipeline import Pipeline
from tierloom.stages.contract.stage import ModelFacts
from tierloom.stages.errors import InputError, LayoutError
from tierloom.stages.kv.block_table import BlockTable
from tierloom.stages.kv.rope import Rotation, frequencies

if TYPE_CHECKING:
    from tierloom.adapters.vllm.repair.engine_model import EngineModel

log = logging.getLogger("tierloom.vllm")

_SPECULATIVE = {"draft_model", "medusa", "mlp_speculator", "ngram", "ngram_gpu", "suffix"}
"""Ways of speculative decoding that keep no KV of their own, or one of tokens alone."""


def vllm_rank(parallel: Any) -> Rank:
    """The position of this process, once vLLM's process groups exist."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    tp, pp = get_tp_group(), get_pp_group()
    return Rank(
        tp.rank_in_group, tp.world_size, pp.rank_in_group, pp.world_size,
        # Of a dense model vLLM sets the rank back to 0, and the size to 1.
        parallel.data_parallel_index, parallel.data_parallel_size,
    )  # fmt: skip


class GroupPipeline:
    """One group, its pipeline, and vLLM's block tables as the pipeline takes them."""

    def __init__(self, group: CacheGroup, pipeline: Pipeline) -> None:
        self.group, self.pipeline = group, pipeline
        self.caches = group.caches

    def blocks(self, table: BlockTable) -> BlockTable:
        """A table of vLLM's blocks as blocks of the tensors."""
        return table.split(self.group.split, self.group.layout.block_tokens)


def open_pipelines(
    vllm_config: Any, kv_cache_config: Any, conf: Configured, caches: Mapping[str, Any], rank: Rank
) -> tuple[list[GroupPipeline], WorkerInfo, EngineModel | None]:
    """Open a pipeline for each KV group, all or none of them. With them what the scheduler is told
    of them, and the engine's model where prompts may be blended.

    Raises ConfigError (the user can fix it) and LayoutError (the KV of this model or backend cannot
    be stored: the engine goes on without).
    """
    model = vllm_config.model_config
    _refuse(vllm_config)
    groups = cache_groups(
        caches, kv_cache_config, vllm_config.compilation_config.static_forward_context
    )
    shared = _shared(vllm_config, conf)
    weights = shared.weights if shared else conf.settings.weights or weights_id(vllm_config)
    facts = ModelFacts(model.get_total_num_hidden_layers(), calibrated_id(vllm_config))
    alone = len(groups) == 1 and rank.pp_size == 1
    first, last = model.get_layers_start_end_indices(vllm_config.parallel_config)
    pipelines: list[GroupPipeline] = []
    engine, rotation, exactly = _blending(vllm_config, kv_cache_config, conf, groups)
    try:
        for group in groups:
            heads, twin = rank.heads(_heads(group, model))
            overrides = _overrides(conf, rank, group, len(groups), kv_cache_config.hash_block_size)
            pipeline = Pipeline(
                conf.pipeline(overrides), group.layout,
                model=conf.settings.name, weights=weights,
                rope=shared.rope if shared else _rope(model, group),
                layers=None if alone else (first, last), heads=heads, part=group.part,
                backend=group.backend, replica=twin, watch=True, facts=facts,
                rotation=rotation,
            )  # fmt: skip
            pipelines.append(GroupPipeline(group, pipeline))
            _prove(group, pipeline)
    except BaseException:
        for made in pipelines:
            made.pipeline.close()
        raise
    layers = pipelines[0].group.layout.layers if alone else model.get_total_num_hidden_layers()
    info = _info(pipelines, layers, _heads(groups[0], model))
    for each in pipelines:
        each.pipeline.seeded_by(info.namespace)
        each.pipeline.introduce(door=http_url(conf.settings.http))
    return pipelines, info._replace(exactly=exactly), engine


def _blending(
    vllm_config: Any, kv_cache_config: Any, conf: Configured, groups: list[CacheGroup]
) -> tuple[EngineModel | None, Rotation | None, str]:
    """The engine's model and how it turns K, where prompts may be blended; else why not."""
    if conf.settings.blend == "off":
        return None, None, "blending is off"
    from tierloom.adapters.vllm.repair.engine_model import find_model
    from tierloom.adapters.vllm.repair.proofs import read_rotation

    if conf.settings.load != "async":
        return None, None, "loads go layer by layer: set tierloom.load: async"
    try:
        model = find_model(vllm_config, kv_cache_config, groups)
        return model, read_rotation(model.rotary), ""
    except Exception as error:  # whatever it is, vLLM goes on without
        return None, None, str(error) or repr(error)


def _prove(group: CacheGroup, pipeline: Pipeline) -> None:
    """Raise LayoutError unless the engine's tensors can be stored, and their layout passed the
    self-test that opening a pipeline runs."""
    if group.opaque and not pipeline.native:
        raise LayoutError(
            f"how {group.backend.split()[1]} lays out K and V is unknown, so its blocks "
            "can be stored in native order only: remove what needs another order (stages that work "
            "on tokens and heads, or SGLang's keys)"
        )
    if pipeline.off:
        raise LayoutError(pipeline.off)


def _heads(group: CacheGroup, model: Any) -> int:
    """KV heads of the whole model; a latent counts as one."""
    return 1 if group.layout.kv == 1 else int(model.get_total_num_kv_heads())


def _rope(model: Any, group: CacheGroup) -> str:
    """The RoPE parameters, if a codec can rotate K back with them; the content id of the weights
    covers them in any case. The same in all ranks."""
    found = rope_text(model.hf_text_config.to_dict())
    return found if len(frequencies(found, group.layout.dim)) else ""


def _shared(vllm_config: Any, conf: Configured) -> SharedIdentity | None:
    """What identifies the model to SGLang as well, if keys are to be SGLang's; None: only vLLM's
    own engines come to the same names."""
    if conf.pipeline().chunk.keys != "sglang":
        return None
    if conf.settings.weights:
        config = vllm_config.model_config.hf_text_config.to_dict()
        return SharedIdentity(conf.settings.weights, shared_rope(config))
    try:
        return shared_identity(vllm_config)
    except InputError as error:
        log.warning("what this engine keeps is shared with vLLM alone, not with SGLang: %s", error)
        return None


def _info(pipelines: list[GroupPipeline], layers: int, heads: int) -> WorkerInfo:
    pipeline = pipelines[0].pipeline
    spec = pipeline.spec
    plan, asked = lookup_node(spec), asked_tiers(spec)
    local = tuple(t for t in asked if spec.tiers[t].cls.local)
    native = max(
        (p.pipeline.geometry.block_tokens for p in pipelines if p.pipeline.native), default=1
    )
    return WorkerInfo(
        namespace=pipeline.whole(layers, heads), keys=spec.chunk.keys, grain=spec.chunk.grain,
        chunk=spec.chunk.tokens, unit=math.lcm(native, spec.chunk.grain),
        groups=len(pipelines), tiers=local,
        remote=next((t for t in asked if not spec.tiers[t].cls.local), ""),
        uses={name: tier.use for name, tier in spec.tiers.items()},
        worth=plan.options.worth if plan else "never",
        deadline=spec.graphs["retrieve"].options.deadline if plan else 0.0,
        token_bytes=sum(
            p.pipeline.geometry.frame_bytes(p.pipeline.geometry.layers, spec.chunk.tokens)
            for p in pipelines
        ) // spec.chunk.tokens,
        off="", by_content=keeps_content(spec),
    )  # fmt: skip


def _overrides(
    conf: Configured, rank: Rank, group: CacheGroup, groups: int, hash_block: int | None
) -> dict[str, Any]:
    """The user's, and what several processes or groups must not share: folders and budgets."""
    by_layer = conf.settings.saves_by_layer(group.layout.device)
    overrides = {"graphs.store.pace.by": "layer"} if by_layer else {}
    overrides |= conf.overrides
    ours: dict[str, Any] = {}
    if conf.settings.keys == "engine" and hash_block:
        ours["chunk.grain"] = hash_block
    spec = conf.pipeline(overrides | ours)
    folder = "-".join(p for p in (rank.folder, f"g{group.number}" if groups > 1 else "") if p)
    ours |= own_paths(spec, folder)
    workers = rank.dp * rank.tp_size * rank.pp_size + rank.index
    ours |= own_ports(spec, workers * groups + group.number)
    for name, tier in spec.tiers.items():
        if tier.cls.local and groups > 1 and hasattr(tier.options, "capacity"):
            ours[f"tiers.{name}.capacity"] = tier.options.capacity // groups
    if groups > 1:
        ours["budget.arena"] = max(1 << 20, spec.budget.arena // groups)
    # After all that the user sets for the same, with dots or in a mapping: the last one wins.
    return {path: value for path, value in overrides.items() if path not in ours} | ours


def _refuse(vllm_config: Any) -> None:
    """Raise LayoutError for ways of running in which a block does not hold whole tokens."""
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(vllm_config.parallel_config, name, None) or 1
        if size > 1:
            raise LayoutError(f"{name} is {size}: blocks are spread over ranks")
    spec = getattr(vllm_config, "speculative_config", None)
    if spec is not None and spec.method not in _SPECULATIVE:
        raise LayoutError(
            f"speculative decoding by {spec.method}: the KV of such a draft's layers is computed "
            "from the model's output for the next token, which the key of a prefix does not cover; "
            f"supported: {', '.join(sorted(_SPECULATIVE))}"
        )
