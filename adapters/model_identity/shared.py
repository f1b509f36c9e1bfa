"""One content id of a model that vLLM, SGLang and transformers compute alike, to share its KV.

Made of what lies on disk (the raw config.json and the weight files) and of what changes KV in every
engine. No class of any engine reads the config, as their versions differ and complete it
differently.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from tierloom.adapters.model_identity.config import BY_LENGTH, config_text
from tierloom.adapters.model_identity.weights import KINDS, files_id, find
from tierloom.stages.errors import InputError
from tierloom.stages.kv.namespace import tlv

_DTYPES = {
    "float32": "float32", "float": "float32", "fp32": "float32",
    "float16": "float16", "half": "float16", "fp16": "float16",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
}  # fmt: skip
"""Dtypes that a model is computed in, by the names that engines have for them."""
_KV_DTYPES = _DTYPES | {
    "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "float8_e4m3fn": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2", "float8_e5m2": "float8_e5m2",
}  # fmt: skip
_QUANTIZED_FILES = ("quantization_config", "compression_config")
"""Keys of a config whose weight files are quantized: its text names the method already, and engines
differ in what they call it."""

_ROPE_TYPES = {
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip
"""Kinds of RoPE that a codec can turn K back by, and the parameters of each."""
_NOT_ONE_TURN = (
    "rope_local_base_freq", "full_attention", "sliding_attention", "kv_lora_rank", "mrope_section",
)  # fmt: skip
"""Keys of a config whose layers, channels or positions do not all turn alike."""


class SharedIdentity(NamedTuple):
    """What every engine passes on to its pipeline, to find what another has kept."""

    weights: str
    """Content id of the weights, as hex, and of how they are computed with."""
    rope: str
    """RoPE parameters as canonical JSON; empty where no codec could use them."""


def shared_id(
    model: str, *, revision: str | None = None, download_dir: str | None = None, dtype: str,
    kv_dtype: str = "auto", quantization: str | None = None,
) -> SharedIdentity:  # fmt: skip
    """The identity of `model`, a folder or a hub id in the local cache (`download_dir`, or Hugging
    Face's), as it is run: `dtype` of what is computed, `kv_dtype` of what is kept (auto: the same),
    `quantization` that the engine adds to files which have none.

    Reads up to 64 MiB of the weight files, or samples of them. Raises InputError where that is not
    all that makes the KV what it is, or cannot be read.
    """
    config = _raw_config(model, revision, download_dir)
    text = config_text(config)
    by_length = [mark for mark in BY_LENGTH if mark in text]
    if by_length or _rope_said(config)[0] == "dynamic":
        raise _unnamed(model, "its KV depends on the longest prompt that an engine takes")
    if not (files := files_id(model, revision, download_dir)):
        raise _unnamed(model, f"no weight files ({', '.join(KINDS)}) of it can be read here")
    computed = _known(dtype, _DTYPES, "dtype")
    kept = computed if kv_dtype == "auto" else _known(kv_dtype, _KV_DTYPES, "kv_dtype")
    added = quantization if not any(config.get(key) for key in _QUANTIZED_FILES) else None
    named = tlv(
        ("tierloom", b"shared model/1"), ("config", text.encode()), ("files", files.encode()),
        ("dtype", computed.encode()), ("kv_dtype", kept.encode()),
        ("quantization", (added or "").encode()),
    )  # fmt: skip
    return SharedIdentity(hashlib.sha256(named).hexdigest(), shared_rope(config))


def shared_rope(config: Mapping[str, Any]) -> str:
    """RoPE parameters of a config, as canonical JSON that `stages/kv/rope.py` reads; the same for
    the old spelling (`rope_theta`, `rope_scaling`) and the new one (`rope_parameters`).

    Empty where they are missing, or of another kind: K is then kept as it is turned.
    """
    kind, said = _rope_said(config)
    wanted = _ROPE_TYPES.get(kind)
    if wanted is None or any(said.get(key) for key in _NOT_ONE_TURN):
        return ""
    found: dict[str, Any] = {name: said.get(name) for name in wanted}
    for name, default in (("rope_theta", None), ("partial_rotary_factor", 1.0)):
        found[name] = said.get(name) or default
    try:
        numbers = {name: float(value) for name, value in found.items()}
    except (TypeError, ValueError):  # one is missing, or no number
        return ""
    if not all(math.isfinite(number) and number > 0 for number in numbers.values()):
        return ""
    if numbers["partial_rotary_factor"] == 1:
        del numbers["partial_rotary_factor"]
    return json.dumps({"rope_type": kind} | numbers, sort_keys=True)


def _rope_said(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kind of RoPE, and the config's keys with those of its RoPE parameters above them."""
    config = config.get("text_config") or config
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return str(said.get("rope_type") or said.get("type") or "default"), {**config, **said}


def _raw_config(model: str, revision: str | None, download_dir: str | None) -> dict[str, Any]:
    """config.json as it lies on disk. Raises InputError."""
    _, files = find(model, revision, download_dir, ["config.json"]) if model else (None, [])
    if not files:
        raise _unnamed(model, "no config.json of it is found here")
    try:
        return dict(json.loads(files[0].read_text("utf-8")))
    except (OSError, TypeError, ValueError) as e:
        raise _unnamed(model, f"{files[0]} cannot be read: {e}") from e


def _known(said: str, names: Mapping[str, str], option: str) -> str:
    """The one name of a dtype. Raises InputError."""
    name = str(said).removeprefix("torch.")
    if name not in names:
        known = ", ".join(dict.fromkeys(names.values()))
        raise InputError(f"{option}={said!r} names no dtype that engines share: {known}")
    return names[name]


def _unnamed(model: str, why: str) -> InputError:
    return InputError(
        f"{model!r} cannot be named by content: {why}. Give every engine that shares its KV the "
        "same id of your own: tierloom.weights, or weights= in Python"
    )
