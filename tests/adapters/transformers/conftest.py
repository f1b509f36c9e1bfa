"""A tiny random Llama, made from a config: no files, no hub, the same weights in every process."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import LlamaConfig, LlamaForCausalLM

from tierloom.adapters.transformers.cached_model import CachedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

VOCAB = 300


def tiny_llama(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1,
        "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**config | options)).eval()


def spread(model: Any) -> Any:
    """`model` with weights that keep a signal about as large as it comes in, so that attention
    matters: a random model of the usual scale says the same whatever its KV is."""
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                noise = torch.randn(p.shape, generator=chance).to(p.dtype)
                if p.dim() > 1:
                    p.copy_(noise * 1.4 / math.sqrt(p.shape[-1]))
                else:
                    p.add_(noise * 0.1)
        embeddings = model.get_input_embeddings()
        if isinstance(embeddings, torch.nn.Embedding):
            embeddings.weight.mul_(math.sqrt(embeddings.weight.shape[-1]) / 1.4)
    return model


def tokens(n: int, seed: int = 1) -> torch.Tensor:
    """A prompt `[1, n]`."""
    return torch.randint(2, VOCAB, (1, n), generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, ids: torch.Tensor, new: int = 12, **options: Any) -> torch.Tensor:
    """What the model says without any cache of ours."""
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **options
    )


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def keep(tmp_path: Path) -> Iterator[Callable[..., CachedModel]]:
    """`keep(model)` opens a pipeline on this test's own disk folder; the same one every time."""
    opened: list[CachedModel] = []

    def open_(model: Any, **options: Any) -> CachedModel:
        # Segments are preallocated: of 1 GiB each, the tests would fill a disk.
        overrides = {"tiers.warm.path": str(tmp_path / "kv"), "tiers.warm.segment": "64 MiB"}
        overrides |= options.pop("overrides", {})
        opened.append(CachedModel(model, overrides=overrides, **options))
        return opened[-1]

    yield open_
    for kept in opened:
        kept.close()
