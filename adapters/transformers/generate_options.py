"""Which calls of `generate` can be served from stored KV, and what they ask for."""

from __future__ import annotations

from inspect import signature
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationMixin

from tierloom.adapters.transformers.cache import SPARE
from tierloom.stages.errors import InputError

_REFUSED = {
    "cache": "CachedModel makes the cache itself: call its method cache()",
    "past_key_values": "CachedModel makes the cache itself: call its method cache()",
    "cache_implementation": "CachedModel makes the cache itself",
    "inputs_embeds": "keys are made of token ids",
    "token_type_ids": "keys are made of token ids alone",
    "token_healing": "keys are made of the prompt's tokens, which this changes",
    "position_ids": "KV is stored for positions 0, 1, 2, ...",
    "negative_prompt_ids": "guidance runs two sequences",
    "custom_generate": "what it does with the cache is unknown",
    "penalty_alpha": "contrastive search runs several sequences",
    "dola_layers": "it generates with custom code, and what it does with the cache is unknown",
    "constraints": "beam search runs several sequences",
    "force_words_ids": "beam search runs several sequences",
} | dict.fromkeys(
    ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"),
    "assisted decoding is not supported",
)
_OPTIONS = {"logits_to_keep", "tokenizer", "trust_remote_code"} | signature(
    GenerationMixin.generate
).parameters.keys()
"""What `generate` takes besides the fields of a GenerationConfig and what it hands to a model."""


def check_options(
    model: Any, ids: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]
) -> None:
    """Raise InputError for a call whose KV cannot be stored."""
    for key, why in _REFUSED.items():
        own = key == "cache_implementation"  # of a config, ours takes its place
        if (options.get(key) if own else option_of(model, key, options)) not in (None, False):
            raise InputError(f"{key}= cannot be combined with stored KV: {why}")
    for key in ("num_beams", "num_return_sequences"):
        if (option_of(model, key, options) or 1) != 1:
            raise InputError(f"{key} must be 1: stored KV is served to one sequence at a time")
    if options.get("use_cache") is False:
        raise InputError("use_cache=False leaves nothing to store: call model.generate")
    known = _OPTIONS | vars(model.generation_config).keys()
    for key in (key for key, value in options.items() if value is not None and key not in known):
        raise InputError(
            f"{key}= goes to the model itself, and keys are made of token ids alone: call "
            "model.generate"
        )
    prompt_of(ids)
    if mask is not None and (mask.shape != ids.shape or not bool(mask.bool().all())):
        raise InputError("attention_mask must be all ones: padded prompts are not stored")


def option_of(model: Any, key: str, options: dict[str, Any]) -> Any:
    """An option of `generate`: passed to it, else of the config passed to it, else the model's."""
    places = (options.get("generation_config"), model.generation_config)
    found = (options.get(key), *(getattr(config, key, None) for config in places))
    return next((value for value in found if value is not None), None)


def room(model: Any, prompt: int, options: dict[str, Any]) -> int:
    """Tokens to make room for; more room is made if more come."""
    new, total = (
        option_of(model, "max_new_tokens", options),
        option_of(model, "max_length", options),
    )
    return int(new or max((total or 0) - prompt, SPARE))


def prompt_of(ids: torch.Tensor) -> npt.NDArray[np.int64]:
    """The token ids of the one prompt in `[1, tokens]`. Raises InputError."""
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point():
        raise InputError("input_ids must be a [1, tokens] tensor of integers")
    if ids.shape[0] != 1:
        raise InputError(f"a batch of {ids.shape[0]}: stored KV is served to one prompt at a time")
    if not ids.shape[1]:
        raise InputError("an empty prompt")
    return ids[0].detach().cpu().numpy().astype(np.int64)
