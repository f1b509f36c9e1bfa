"""What makes the KV of two vLLM engines the same, named by content: config, precision, weights.

No path and no machine is in it, so the workers of one engine, and engines elsewhere, come to the
same name. Ask in the workers: model classes of vLLM complete their copy of the config, which the
scheduler's process does not see. Reads files; call it off the scheduler's thread.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from tierloom.adapters.model_identity.config import BY_LENGTH, canonical, config_text
from tierloom.adapters.model_identity.shared import SharedIdentity, shared_id
from tierloom.adapters.model_identity.weights import KINDS, files_id, find, hash_files
from tierloom.stages.errors import InputError
from tierloom.stages.kv.namespace import tlv

log = logging.getLogger("tierloom")

_FIRST = {"pt": "*.pt", "npcache": "*.bin", "gguf": "*.gguf"}
"""Load formats that ask for another kind first."""
_OF_FILES = {"auto", "bitsandbytes", "fastsafetensors", "hf", "instanttensor", "mistral",
             "safetensors", *_FIRST}  # fmt: skip
"""Load formats that take what the folder holds; others say in an option where they take it from."""
_AS_ON_DISK = {"auto", "fastsafetensors", "hf", "instanttensor", "safetensors"}
"""Load formats that take the files which every engine takes, as they are."""
_PLAIN_KV = {"auto", "bfloat16", "float16", "float32"}
"""Types of KV cache whose numbers are the model's own."""
_NOT_THE_ADAPTER = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision",
    "task_type",
}  # fmt: skip


def weights_id(vllm_config: Any) -> str:
    """Hex sha256 over all that makes this engine's KV what it is, but block size and parallelism.

    The config with its RoPE parameters and overrides, dtype, quantization, KV dtype, and of each
    weight file its name, size and content: whole up to 64 MiB in all, else 64 strips of 16 KiB per
    file, which tells a retrained or merged model apart but not a change of single weights between
    the strips. Dummy weights are named by their seed. Where no file is found (object storage, a
    custom loader) only the model's name and revision stand for them, and a warning says so.

    Raises OSError when a weight file cannot be read.
    """
    model, load, cache = (
        vllm_config.model_config, vllm_config.load_config, vllm_config.cache_config,
    )  # fmt: skip
    config = config_text(model.hf_config.to_dict())
    facts: dict[str, Any] = {
        "config": config,
        "dtype": str(model.dtype),
        "quantization": [model.quantization, getattr(model, "quantization_config", None)],
        "cache_dtype": str(cache.cache_dtype),
        "unquantized_layers": list(getattr(cache, "kv_cache_dtype_skip_layers", ())),
    }
    if any(mark in config for mark in BY_LENGTH):
        facts["max_model_len"] = model.max_model_len
    how = str(load.load_format)
    if how == "dummy":
        facts["dummy"] = model.seed
    elif how not in _OF_FILES:
        facts["loader"] = [how, getattr(load, "model_loader_extra_config", None)]
    if draft := draft_model(vllm_config):
        facts["draft"] = [config_text(draft.hf_config.to_dict()), str(draft.dtype),
                          draft.quantization]  # fmt: skip
    h = hashlib.sha256(canonical(facts).encode())
    for one in (model, draft) if how != "dummy" else ():
        if one is not None:
            _hash_weights(h, one, load)
    return h.hexdigest()


def shared_identity(vllm_config: Any) -> SharedIdentity:
    """What SGLang and transformers identify this model by as well. Raises InputError where more
    than the files on disk makes this engine's KV what it is."""
    model, load, cache = (
        vllm_config.model_config, vllm_config.load_config, vllm_config.cache_config,
    )  # fmt: skip
    how, kv_dtype = str(load.load_format), str(cache.cache_dtype)
    quantized = getattr(model.hf_config, "quantization_config", None)
    more = {
        f"load format {how}": how not in _AS_ON_DISK,
        "weights in object storage": getattr(model, "model_weights", ""),
        "hf_overrides": model.hf_overrides,
        "hf_config_path": model.hf_config_path,
        f"config format {model.config_format}": model.config_format not in ("auto", "hf"),
        f"quantization {model.quantization} at load": model.quantization and not quantized,
        "quantization_config": getattr(model, "quantization_config", None),
        f"KV in {kv_dtype}": kv_dtype not in _PLAIN_KV,
        "a draft model": draft_model(vllm_config),
    }
    if found := [what for what, is_so in more.items() if is_so]:
        raise InputError(
            f"{model.model} runs with {', '.join(found)}, which no other engine is known to do "
            "alike: set tierloom.weights to the same id of your own in all of them if they do"
        )
    return shared_id(
        model.model, revision=model.revision, download_dir=getattr(load, "download_dir", None),
        dtype=str(model.dtype), kv_dtype=kv_dtype, quantization=model.quantization,
    )  # fmt: skip


def draft_model(vllm_config: Any) -> Any:
    """vLLM's ModelConfig of a draft model whose KV lies beside the model's own, or None."""
    spec = getattr(vllm_config, "speculative_config", None)
    return spec.draft_model_config if spec is not None and spec.method == "draft_model" else None


def drafted(vllm_config: Any) -> int:
    """Tokens up to which vLLM lets a draft model run; 0 where there is none."""
    draft = draft_model(vllm_config)
    if draft is None:
        return 0
    longest = draft.max_model_len or vllm_config.model_config.max_model_len
    return int(longest) - int(vllm_config.speculative_config.num_speculative_tokens)


def calibrated_id(vllm_config: Any) -> str:
    """What calibrations of this engine's model are found by; empty where no file is it."""
    model, load = vllm_config.model_config, vllm_config.load_config
    remote = getattr(model, "model_weights", "")
    if remote or str(load.load_format) not in _OF_FILES:
        return ""
    return files_id(model.model, model.revision, getattr(load, "download_dir", None))


def adapter_id(path: str | Path) -> str:
    """Hex sha256 over a LoRA folder: adapter_config.json, and its weight files like a model's.

    `path` is a folder, or a hub id in the local cache. Raises InputError when it holds no weights
    or no config: a name alone would be shared by different adapters, so such requests must not be
    kept. Raises OSError when a weight file cannot be read.
    """
    folder, files = find(os.path.expanduser(path), None, None, KINDS)
    if folder is None or not files:
        raise InputError(
            f"{path}: no adapter weights ({', '.join(KINDS)}) found here, so what is computed "
            "with them cannot be identified: use a local folder"
        )
    try:
        config = dict(json.loads((folder / "adapter_config.json").read_text("utf-8")))
    except (OSError, TypeError, ValueError) as e:
        raise InputError(f"{path}: adapter_config.json cannot be read: {e}") from e
    kept = {k: v for k, v in config.items() if k not in _NOT_THE_ADAPTER}
    h = hashlib.sha256(canonical(kept).encode())
    hash_files(h, folder, files)
    return h.hexdigest()


def _hash_weights(h: Any, model: Any, load: Any) -> None:
    """Put the content of the model's weight files into `h`; their name where there is none."""
    # set when `model` is a folder that only holds the config of a model in object storage
    remote = getattr(model, "model_weights", "")
    folder: Path | None = None
    files: list[Path] = []
    if not remote:
        first = _FIRST.get(str(load.load_format), KINDS[0])
        kinds = (first, *(k for k in KINDS if k != first))
        where = getattr(load, "download_dir", None)
        folder, files = find(model.model, model.revision, where, kinds)
    if folder is not None and files:
        return hash_files(h, folder, files)
    log.warning(
        "no weight files found for %s: its KV is identified by that name and its revision only; "
        "set tierloom.weights to a content id, above all if the weights can change",
        remote or model.model,
    )
    h.update(tlv(("name", str(remote or model.model).encode()),
                 ("revision", str(model.revision).encode())))  # fmt: skip
    return None
