"""What makes two models the same to a cache: their config as text, their weights as strips.

Shared by the adapters, and free of torch and of every engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

STRIP = 16 << 10
"""Bytes of one strip, where something is too large to be hashed whole."""
STRIPS = 64

_NOT_THE_MODEL = {
    "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label",
    "label2id", "pad_token_id", "problem_type", "return_dict", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
"""Keys of a config that change no KV; nor do those that begin with `_` or `output_`."""

BY_LENGTH = ('"longrope"', '"su"', "llama4")
"""What the text of a config holds whose KV depends on an engine's longest prompt: it chooses the
long RoPE factors (longrope, su) and switches temperature tuning on (llama4)."""


def config_text(config: Mapping[str, Any]) -> str:
    """A Hugging Face config as canonical JSON, without what changes no KV or names a place."""
    kept = {k: v for k, v in config.items() if k not in _NOT_THE_MODEL}
    return canonical({k: _plain(v) for k, v in kept.items() if not k.startswith(("_", "output_"))})


def canonical(facts: Any) -> str:
    """Sorted JSON, the same in every process: sets are sorted, no object names its address."""

    def named(value: object) -> Any:
        if isinstance(value, (set, frozenset)):
            return sorted(map(str, value))
        text = str(value)
        return type(value).__qualname__ if " at 0x" in text else text

    return json.dumps(facts, sort_keys=True, default=named)


def rope_text(config: Mapping[str, Any]) -> str:
    """The RoPE parameters of a Hugging Face config as canonical JSON; '' where it has none."""
    found = config.get("rope_parameters")
    return json.dumps(found, sort_keys=True, default=str) if found else ""


def strip_starts(nbytes: int, strip: int = STRIP, strips: int = STRIPS) -> Iterator[int]:
    """Offsets of `strips` evenly spaced strips of `strip` bytes, the first and last byte included.

    `nbytes` is more than `strip * strips`, so that no two overlap.
    """
    step = (nbytes - strip) // (strips - 1)
    for i in range(strips - 1):
        yield i * step
    yield nbytes - strip


def _plain(value: Any) -> Any:
    """`value` without private keys at any depth: a part's `_name_or_path` is a place, too."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if not str(k).startswith("_")}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
