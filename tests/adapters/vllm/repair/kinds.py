"""Tiny models of several position embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models

SHORT = {"original_max_position_embeddings": 512, "rope_theta": 10000.0}
ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_type": "default", "rope_theta": 1e6},
    "partial": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        **SHORT,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, **SHORT},
}  # fmt: skip
_SIZE = {"vocab_size": models.VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama(folder: Path, rope: str) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048,
        tie_word_embeddings=False, rope_parameters=ROPES[rope], **_SIZE,
    )  # fmt: skip
    return models._write(folder, LlamaForCausalLM, config, seed=0)


def gptj(folder: Path) -> Path:
    """Pairs of neighboring channels turn, in half of a head."""
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(
        n_positions=2048, n_embd=128, n_layer=2, n_head=4, rotary_dim=16,
        tie_word_embeddings=False, **_SIZE,
    )  # fmt: skip
    return models._write(folder, GPTJForCausalLM, config, seed=0)


def bloom(folder: Path) -> Path:
    """ALiBi: K says nothing of its place."""
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(hidden_size=128, n_layer=2, n_head=4, **_SIZE)
    return models._write(folder, BloomForCausalLM, config, seed=0)


def gpt2(folder: Path) -> Path:
    """Learned positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_positions=2048, n_embd=128, n_layer=2, n_head=4, **_SIZE)
    return models._write(folder, GPT2LMHeadModel, config, seed=0)
