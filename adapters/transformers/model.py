"""A Hugging Face model as a cache needs it: whether its KV can be stored, its shape, its identity.

Nothing is guessed from the config alone: one token is run through the model, and what its own cache
holds afterwards is what is described. Then it answers a prompt of which a part is kept already, and
must say what it says without.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator
from inspect import signature
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from tierloom.adapters.model_identity.config import (
    STRIP,
    STRIPS,
    config_text,
    rope_text,
    strip_starts,
)
from tierloom.adapters.model_identity.weights import files_id
from tierloom.adapters.transformers.cache import TierloomCache
from tierloom.adapters.transformers.shape import KVShape
from tierloom.stages.errors import InputError, LayoutError

WHOLE = 1 << 30
"""Bytes of weights that are hashed whole; of larger models each large tensor is sampled."""
TRIED, KEPT = 9, 4
"""Tokens of the prompt that a model is tried with, and how many of them are cached already."""


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """`cache` by the name that `model` has for it: transformers 5.24 renamed `past_key_values`."""
    names = signature(type(model).forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def generated_with(model: Any, cache: Any) -> dict[str, Any]:
    """Options that have `model.generate` use `cache`, whatever its generation config says."""
    options = with_cache(model, cache)
    if getattr(model.generation_config, "cache_implementation", None):
        options["cache_implementation"] = None
    return options


def shape_of(model: Any) -> KVShape:
    """The shape of `model`'s KV, learned by running one token through it; then its answer to a
    prompt that is kept in part is tried.

    Raises LayoutError when its KV cannot be kept (and says why), InputError when the model is in a
    state in which it should not be (training, with adapters loaded).
    """
    config = model.config
    kind = getattr(config, "model_type", "") or type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise LayoutError(f"{kind} is an encoder-decoder model: only causal LMs are supported")
    if config.get_text_config(decoder=True) is not config:
        raise LayoutError(f"{kind} takes more than text: its KV does not depend on token ids alone")
    if getattr(config, "use_bidirectional_attention", False):
        raise LayoutError(
            f"{kind} attends to later tokens: its KV does not depend on a prefix alone"
        )
    for rope in _rope_types(config):
        if rope in ("dynamic", "longrope"):
            raise LayoutError(
                f"{kind} has rope_type {rope}: the K of a prefix changes with the prompt's length"
            )
    if model.training:
        raise InputError(
            "the model is in training mode, where dropout changes KV: call model.eval()"
        )
    if getattr(model, "_hf_peft_config_loaded", False) or getattr(model, "peft_config", None):
        raise InputError("the model has PEFT adapters that can be switched at run time: merge them")
    cache = DynamicCache(config=config)
    _full_attention(kind, cache)
    try:
        _run_one_token(model, cache)
        _full_attention(kind, cache)
        shape = _shape(kind, cache)
        off = _tried(model, shape)
    except (InputError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as e:  # whatever a model does with a cache that it does not expect
        raise LayoutError(
            f"{kind} fails if it is run with a cache, so its KV cannot be stored: "
            f"{type(e).__name__}: {str(e)[:200]}"
        ) from e
    if not off <= _noise(shape.dtype):
        raise LayoutError(
            f"{kind} answers differently if {KEPT} of {TRIED} tokens are cached (its logits "
            f"are off by {off:.1g} of their size): it attends to later tokens, or does not "
            "continue from what its cache holds"
        )
    return shape


def fingerprint(model: Any, changed: Collection[str] = ()) -> str:
    """sha256 over what the weights and the config are, as hex; the same in every process.

    Up to 1 GiB of weights are hashed whole (about 1 s/GiB). Of larger models each tensor over 1 MiB
    gives 64 strips of 16 KiB, evenly spaced: a retrained or merged model is distinguished, a change
    of single weights between the strips is not (pass `weights=` where that matters). Those that are
    known to have `changed` are hashed whole in any case.
    """
    h = hashlib.sha256(config_text(model.config.to_dict()).encode())
    tensors = dict(_weights(model))
    whole = sum(t.nbytes for t in tensors.values()) <= WHOLE
    for name, t in sorted(tensors.items()):
        if t.device.type == "meta":
            raise InputError(f"{name} is offloaded and cannot be read: pass weights=, a content id")
        h.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        raw = t.detach().contiguous().view(-1).view(torch.uint8)
        all_of_it = whole or name in changed or raw.numel() <= STRIPS * STRIP
        strips = [raw] if all_of_it else _strips(raw)
        for strip in strips:
            h.update(strip.cpu().numpy().data)
    return h.hexdigest()


def rope(model: Any) -> str:
    """RoPE parameters as canonical JSON; '' for a model that has none."""
    return rope_text({"rope_parameters": getattr(model.config, "rope_parameters", None)})


def weight_files(model: Any) -> str:
    """Content id of the files that the model was loaded from; '' for one that was made here."""
    return files_id(getattr(model.config, "name_or_path", ""))


def _rope_types(config: Any) -> Iterator[str]:
    found = getattr(config, "rope_parameters", None) or {}
    for part in (found, *found.values()):
        if isinstance(part, dict) and "rope_type" in part:
            yield part["rope_type"]


def _full_attention(kind: str, cache: DynamicCache) -> None:
    """transformers' own choice of cache says what each layer keeps."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer:
            name = type(layer).__name__.removeprefix("Dynamic")
            raise LayoutError(
                f"layer {i} of {kind} has a {name}: only full attention in every layer is supported"
                " (no sliding window, no hybrid or linear attention, no shared KV)"
            )


def _run_one_token(model: Any, cache: DynamicCache) -> None:
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    with torch.no_grad():
        model(input_ids=token, use_cache=True, **with_cache(model, cache))


def _tried(model: Any, shape: KVShape) -> float:
    """How far the logits after a prompt are off, as a share of their size, when its first tokens
    come out of another prompt's cache: the worse of what `generate` and a bare forward say."""
    words = getattr(model.config, "vocab_size", None) or TRIED
    ids = ((torch.arange(TRIED, device=model.device) * 7 + 5) % words).unsqueeze(0)
    found = []
    for logits in (_generated, _forward):
        cache = TierloomCache(None, shape, ids[0].cpu().numpy(), retrieve=False, store=False)
        logits(model, ids[:, :KEPT], cache)
        kept = logits(model, ids[:, 0 if logits is _generated else KEPT :], cache)
        alone = logits(model, ids, DynamicCache(config=model.config))
        found.append(float((kept - alone).norm() / alone.norm().clamp(min=1e-20)))
    return max(found, key=lambda off: (math.isnan(off), off))


def _forward(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """The model's logits for the token after `ids`, which follow what `cache` holds."""
    with torch.no_grad():
        out = model(ids, use_cache=True, **with_cache(model, cache))
    logits: torch.Tensor = out.logits[:, -1].float()
    return logits


def _generated(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """What `generate` says of the token after `ids`, float32."""
    how = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=1, do_sample=False, num_beams=1, num_return_sequences=1, use_cache=True,
        output_logits=True, return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=how,
        **generated_with(model, cache),
    )  # fmt: skip
    logits: torch.Tensor = out.logits[0].float()
    return logits


def _noise(dtype: torch.dtype) -> float:
    """How far logits may be off because sums are taken in another order."""
    return 0.02 if dtype in (torch.float32, torch.float64) else 0.25


def _shape(kind: str, cache: DynamicCache) -> KVShape:
    seen: set[tuple[Any, ...]] = set()
    for i, layer in enumerate(cache.layers):
        assert isinstance(layer, DynamicLayer)
        k, v = layer.keys, layer.values
        if k is None or v is None or k.dim() != 4 or k.shape[2] != 1:
            raise LayoutError(
                f"layer {i} of {kind} cached nothing of a token that was run through it"
            )
        if k.shape != v.shape or k.dtype != v.dtype:
            raise LayoutError(
                f"layer {i} of {kind}: K is {tuple(k.shape)}, V is {tuple(v.shape)}; "
                "only models whose K and V are alike are supported"
            )
        seen.add((k.shape[1], k.shape[3], k.dtype, k.device))
    if len(seen) != 1:
        raise LayoutError(
            f"the layers of {kind} differ in heads, head size, dtype or device: "
            f"one layout must serve them all, not {len(seen)}"
        )
    heads, dim, dtype, device = seen.pop()
    return KVShape(layers=len(cache.layers), heads=heads, dim=dim, dtype=dtype, device=device)


def _weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers; a tensor that two names share comes once."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, t in sorted(model.state_dict().items()):
        if isinstance(t, torch.Tensor) and (mark := (t.data_ptr(), tuple(t.shape))) not in seen:
            seen.add(mark)
            yield name, t


def _strips(raw: torch.Tensor) -> Iterator[torch.Tensor]:
    for at in strip_starts(raw.numel(), STRIP, STRIPS):
        yield raw[at : at + STRIP]
