"""The identity by which vLLM, SGLang and transformers find each other's KV."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tierloom.adapters.model_identity.shared import SharedIdentity, shared_id, shared_rope
from tierloom.adapters.vllm.exchange.identity import shared_identity
from tierloom.stages.errors import InputError
from tierloom.stages.kv.rope import frequencies

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "transformers_version": "5.0.0", "_name_or_path": "/somewhere", "use_cache": True,
}  # fmt: skip
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of two weight files."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "a.safetensors").write_bytes(bytes(range(256)) * 40)
    (made / "b.safetensors").write_bytes(b"b" * 5000)
    configure(made)
    return made


def configure(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def of(folder: Path | str, **how: Any) -> SharedIdentity:
    return shared_id(str(folder), **{"dtype": "float32"} | how)


def test_the_id_never_changes(folder: Path) -> None:
    """Other engines, and later versions, must come to it."""
    assert of(folder) == SharedIdentity(
        "91de2821cbded655a389cc41c3e66924b83f75d70437b7aa59a4556f46dfada4",
        '{"rope_theta": 10000.0, "rope_type": "default"}',
    )


def test_what_changes_no_kv_changes_no_id(folder: Path, tmp_path: Path) -> None:
    same = of(folder)
    assert of(shutil.copytree(folder, tmp_path / "copy")) == same
    assert of(folder, dtype="torch.float32", kv_dtype="fp32", quantization="") == same
    (folder / "tokenizer.json").write_text("{}")
    configure(folder, transformers_version="4.1", torch_dtype="float16", use_cache=False)
    assert of(folder) == same


def test_what_changes_kv_changes_the_id(folder: Path) -> None:
    found = [of(folder), of(folder, dtype="bfloat16"), of(folder, quantization="fp8")]
    found += [of(folder, kv_dtype=kind) for kind in ("fp8", "fp8_e5m2", "bfloat16")]
    configure(folder, hidden_size=65)
    found.append(of(folder))
    configure(folder)
    (folder / "b.safetensors").write_bytes(b"b" * 4999 + b"c")
    found.append(of(folder))
    assert len({one.weights for one in found}) == len(found)


def test_the_files_say_how_they_are_quantized(folder: Path) -> None:
    """Engines name one method by the kernel that they chose for it."""
    plain = of(folder)
    configure(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    names = {of(folder, quantization=name) for name in (None, "gptq", "gptq_marlin")}
    assert len(names) == 1
    assert plain not in names


def test_a_model_that_cannot_be_named_is_refused_with_the_cure(
    folder: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for nowhere in (empty, "", "tierloom-tests/not-there", folder / "a.safetensors"):
        with pytest.raises(InputError, match=r"no config\.json .*tierloom\.weights, or weights="):
            of(nowhere)
    shutil.copy(folder / "config.json", empty)
    with pytest.raises(InputError, match="no weight files"):
        of(empty)
    for text in ("{", "[1]"):
        (empty / "config.json").write_text(text)
        with pytest.raises(InputError, match="cannot be read"):
            of(empty)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama4"},
        {"rope_scaling": {"type": "su", "long_factor": [1.0]}},
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ],
)
def test_kv_that_depends_on_the_longest_prompt_is_refused(
    folder: Path, change: dict[str, Any]
) -> None:
    configure(folder, **change)
    with pytest.raises(InputError, match="longest prompt"):
        of(folder)


def test_dtypes_are_spelled_out(folder: Path) -> None:
    with pytest.raises(InputError, match=r"dtype='auto' .*float32, float16, bfloat16"):
        of(folder, dtype="auto")
    with pytest.raises(InputError, match=r"kv_dtype='int4' .*float8_e5m2"):
        of(folder, kv_dtype="int4")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 10000}, {"rope_type": "default", "rope_theta": 10000.0}),
        (
            {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
            {"rope_type": "llama3", "rope_theta": 500000.0} | LLAMA3,
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}},
            {"type": "linear", "rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        ),
        (
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_scaling": None},
            {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5},
        ),
    ],
)
def test_old_and_new_rope_are_one_text(old: dict[str, Any], new: dict[str, Any]) -> None:
    text = shared_rope(old)
    assert text == shared_rope({"rope_parameters": new}) != ""
    assert shared_rope({"text_config": old}) == text
    turns = frequencies(json.dumps(new), 64)
    assert len(turns)
    assert (frequencies(text, 64) == turns).all()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope_theta": "fast"},
        {"rope_theta": -1},
        {"rope_theta": float("inf")},
        {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear"}},
        {"rope_theta": 1e4, "rope_scaling": {"mrope_section": [1, 2]}},
        {"rope_theta": 1e4, "kv_lora_rank": 512},
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        {"rope_theta": 1e4, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
    ],
)
def test_rope_that_no_codec_can_use_is_left_out(config: dict[str, Any]) -> None:
    assert shared_rope(config) == ""


def engine(folder: Path, **changes: Any) -> Any:
    """As much of a VllmConfig as is read; `changes` go to whichever part has the name."""
    config = json.loads((folder / "config.json").read_text())
    parts = [
        {"model": str(folder), "model_weights": "", "revision": None, "dtype": "torch.float32",
         "hf_config": SimpleNamespace(**config), "hf_overrides": {}, "hf_config_path": None,
         "config_format": "auto", "quantization": None, "quantization_config": None, "seed": 0},
        {"load_format": "auto", "download_dir": None},
        {"cache_dtype": "auto"},
    ]  # fmt: skip
    for name, value in changes.items():
        (part,) = [p for p in parts if name in p]
        part[name] = value
    model, load, cache = (SimpleNamespace(**p) for p in parts)
    return SimpleNamespace(model_config=model, load_config=load, cache_config=cache)


def test_vllm_comes_to_the_same_id(folder: Path) -> None:
    for same in ({}, {"load_format": "safetensors"}, {"cache_dtype": "float32"}, {"seed": 1}):
        assert shared_identity(engine(folder, **same)) == of(folder), same
    assert shared_identity(engine(folder, dtype="torch.float16")) == of(folder, dtype="float16")
    configure(folder, quantization_config={"quant_method": "gptq"})
    assert shared_identity(engine(folder, quantization="gptq_marlin")) == of(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"load_format": "dummy"}, "load format dummy"),
        ({"load_format": "pt"}, "load format pt"),
        ({"model_weights": "s3://bucket/one"}, "weights in object storage"),
        ({"hf_overrides": {"rope_theta": 1.0}}, "hf_overrides"),
        ({"hf_config_path": "/other"}, "hf_config_path"),
        ({"config_format": "mistral"}, "config format mistral"),
        ({"quantization": "fp8"}, "quantization fp8 at load"),
        ({"quantization_config": {"moe": 1}}, "quantization_config"),
        ({"cache_dtype": "fp8"}, "KV in fp8"),
    ],
)
def test_what_no_file_says_of_a_vllm_keeps_it_to_itself(
    folder: Path, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=rf"runs with {says}, which .* set tierloom\.weights"):
        shared_identity(engine(folder, **change))
