"""What is measured: a model (the subject), and a way to store its KV (an arm)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from tierloom.adapters.demo import smollm2
from tierloom.adapters.transformers.model import fingerprint, rope, shape_of
from tierloom.adapters.transformers.shape import KVShape
from tierloom.stages.errors import ConfigError

SMOLLM2 = "smollm2"


@dataclass(frozen=True, slots=True)
class Subject:
    """The measured model: float32, in eval mode."""

    name: str
    model: Any
    encode: Callable[[str], list[int]]
    shape: KVShape
    weights: str
    """Content id of the weights, by which codecs find their calibration."""
    rope: str

    @property
    def positions(self) -> int:
        return int(getattr(self.model.config, "max_position_embeddings", None) or 1 << 30)


class Treated(NamedTuple):
    """What came back, and what was stored for it."""

    kv: torch.Tensor
    """bf16 `[2, layers, tokens, heads, dim]`."""
    stored: int
    """Bytes, everything counted."""
    payload: int
    """Bytes of frames: without headers, and without the padding of pages."""


class Arm(Protocol):
    """One way to store KV."""

    @property
    def name(self) -> str: ...

    def treat(self, ids: torch.Tensor, kv: torch.Tensor) -> Treated:
        """`ids` int64 `[tokens]`, `kv` as in `Treated`; neither is changed."""


def load_subject(name: str) -> Subject:
    """`smollm2`, or a folder that transformers can read, in float32 on the CPU.

    Raises ConfigError if there is no such model, LayoutError if its KV cannot be stored.
    """
    if not name.strip():
        raise ConfigError(f"--model {name!r} is not a model: pass {SMOLLM2}, or a model's folder")
    if name == SMOLLM2:
        model, tokenizer = smollm2.load_smollm2()
    else:
        model, tokenizer = _from_folder(Path(name))
    return subject_of(Path(name).resolve().name, model, tokenizer)


def subject_of(name: str, model: Any, tokenizer: Any) -> Subject:
    """A model and tokenizer that are loaded already."""
    model = model.float().eval()
    encode: Callable[[str], list[int]] = lambda text: tokenizer(text, verbose=False)["input_ids"]  # noqa: E731
    return Subject(name, model, encode, shape_of(model), fingerprint(model), rope(model))


def _from_folder(folder: Path) -> tuple[Any, Any]:
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"--model {folder}: no model there (no config.json): pass {SMOLLM2}, or the folder of "
            "a model as save_pretrained or `hf download` write it"
        )
    with smollm2.quiet():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True
            )
        except (OSError, ValueError) as e:
            raise ConfigError(f"--model {folder}: {str(e).splitlines()[0]}") from e
    return model, tokenizer
