"""A tiny model and its tokenizer, which need no files and no hub."""

from __future__ import annotations

from typing import Any

import torch

from tierloom.adapters.quality.documents import Sizes

TINY = Sizes(contexts=(128,), suffix=32, chunk=64)


def letters(text: str) -> list[int]:
    """A token per byte, behind a BOS."""
    return [1, *(b + 2 for b in text.encode("utf-8"))]


class Letters:
    """`letters` as a tokenizer."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": letters(text)}


def tiny_llama() -> Any:
    """Weights so large that attention matters: a random model of the usual scale sees nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=None,
        pad_token_id=0, initializer_range=0.15,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()
