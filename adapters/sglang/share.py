"""Whose KV an SGLang process computes, named by content, and which share of it is held there."""

from __future__ import annotations

import hashlib
import logging
from typing import Any, NamedTuple

from tierloom.adapters.engine.rank import Rank
from tierloom.adapters.model_identity.config import canonical
from tierloom.adapters.model_identity.shared import SharedIdentity, shared_id
from tierloom.adapters.model_identity.weights import files_id
from tierloom.adapters.sglang.pool import Pages
from tierloom.adapters.sglang.settings import Settings
from tierloom.stages.contract.stage import ModelFacts
from tierloom.stages.errors import ConfigError, InputError, LayoutError
from tierloom.stages.kv.layout import KVLayout

log = logging.getLogger("tierloom.sglang")

_FROM_FILES = {"auto", "bitsandbytes", "fastsafetensors", "gguf", "npcache", "pt", "safetensors"}
"""Load formats that take what the model's folder holds."""


class Share(NamedTuple):
    """What a pipeline is told of the KV that it keeps: keyword arguments of `Pipeline`."""

    model: str
    weights: str
    rope: str
    layers: tuple[int, int] | None
    heads: tuple[int, int] | None
    part: str
    replica: bool
    facts: ModelFacts


def share_of(args: Any, settings: Settings, rank: Rank, pages: Pages, *, start_layer: int) -> Share:
    """The share of `pages` in a process of position `rank`, by SGLang's ServerArgs. Reads the
    model's files. Raises ConfigError where the model cannot be named."""
    named = _named(args, settings, pages)
    latent, layout = pages.layout.kv == 1, pages.layout
    heads, twin = rank.heads(
        layout.heads if rank.tp_size == 1 else _total_heads(args, rank, layout)
    )
    part = _part(args, settings)
    if not latent and heads[1] - heads[0] != layout.heads:  # not split as is usual
        heads, twin = (rank.tp * layout.heads, (rank.tp + 1) * layout.heads), False
        part += f"rank {rank.tp} of {rank.tp_size}"
    files = files_id(args.model_path, args.revision, args.download_dir)
    return Share(
        model=settings.name, weights=named.weights, rope=named.rope,
        layers=None if rank.pp_size == 1 else (start_layer, start_layer + layout.layers),
        heads=None if latent else heads, part=part,
        replica=rank.tp > 0 if latent else twin,
        facts=ModelFacts(layout.layers if rank.pp_size == 1 else 0, files),
    )  # fmt: skip


def refuse_split_pages(config: Any) -> None:
    """Raise LayoutError for ways of running in which a page does not hold whole tokens. `config`:
    SGLang's HiCacheStorageConfig."""
    for name in ("attn_cp_size", "dcp_size"):
        if (getattr(config, name, 1) or 1) > 1:
            raise LayoutError(f"{name} is {getattr(config, name)}: a page is spread over ranks")
    if getattr(config, "should_split_heads", False):
        raise LayoutError("tp_lcm_size splits the heads of a page: remove it from the extra config")


def _named(args: Any, settings: Settings, pages: Pages) -> SharedIdentity:
    kv = str(args.kv_cache_dtype or "auto")
    dtype = pages.layout.dtype if kv == "auto" else str(args.dtype)
    try:
        found = shared_id(
            args.model_path, revision=args.revision, download_dir=args.download_dir, dtype=dtype,
            kv_dtype=kv, quantization=args.quantization,
        )  # fmt: skip
    except InputError as error:
        if settings.weights:
            return SharedIdentity(settings.weights, "")
        raise ConfigError(str(error)) from error
    return found._replace(weights=settings.weights) if settings.weights else found


def _part(args: Any, settings: Settings) -> str:
    """What else keeps KV apart: names of the user's, and keys of another kind."""
    said: dict[str, Any] = {}
    if settings.tags:
        said["tags"] = {str(k): str(v) for k, v in settings.tags.items()}
    overridden = str(getattr(args, "json_model_override_args", None) or "{}")
    if overridden != "{}":  # what the model's files say is not what is run
        said["model"] = overridden
    for name in ("quantization_param_path", "load_format"):
        if str(found := getattr(args, name, None) or "auto") not in _FROM_FILES:
            said[name] = str(found)
    drafted = str(getattr(args, "speculative_algorithm", None) or "").upper()
    if "EAGLE" in drafted or "MTP" in drafted:  # hashes of pairs of tokens: no other engine's
        said["keys"] = drafted
    return canonical(said) if said else ""


def _total_heads(args: Any, rank: Rank, layout: KVLayout) -> int:
    """KV heads of the whole model, as SGLang counts them."""
    try:
        from sglang.srt.configs.model_config import ModelConfig

        return int(ModelConfig.from_server_args(args).get_total_num_kv_heads())
    except Exception:  # another version: then each rank's heads are its own
        log.debug("SGLang does not say how many KV heads the model has", exc_info=True)
        return layout.heads * rank.tp_size


def side_weights(weights: str, name: str, pool: Any) -> str:
    """The content id of a side pool's pages: the model's, and how the pool lays them out."""
    how = {
        "layout": getattr(pool, "layout", ""), "dtype": str(getattr(pool, "dtype", "")),
        "slots": getattr(pool, "page_size", 1), "class": type(pool).__name__,
    }  # fmt: skip
    return hashlib.sha256(canonical({"weights": weights, "pool": name, **how}).encode()).hexdigest()
