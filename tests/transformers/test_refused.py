"""What cannot be kept is refused before anything is opened, with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)  # fmt: skip

from tierloom.adapters.transformers import Kept
from tierloom.adapters.transformers_model import fingerprint, inspect, rope
from tierloom.stages.errors import InputError, LayoutError

from .conftest import tiny_llama, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def dynamic_rope() -> Any:
    return tiny_llama(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    )


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=64)), "sliding window"),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL)), "sliding window"),
        (lambda: MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=64)), "full attention"),
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=64, num_layers=2)),
            "encoder-decoder",
        ),
        (dynamic_rope, "rope_type dynamic"),
    ],
)
def test_a_model_whose_kv_cannot_be_kept(make: Callable[[], Any], why: str) -> None:
    with pytest.raises(LayoutError, match=why):
        Kept(make().eval())


def test_a_model_in_training_mode() -> None:
    with pytest.raises(InputError, match=r"model\.eval"):
        Kept(tiny_llama().train())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
        lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=4, n_head=4)),
    ],
)
def test_other_models_with_full_attention_have_a_shape(make: Callable[[], Any]) -> None:
    shape = inspect(make().eval())
    assert (shape.layers, shape.dim, shape.dtype) == (4, 16, torch.float32)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        ({"use_cache": False}, "use_cache"),
        ({"cache": object()}, "cache"),
        ({"past_key_values": object()}, "past_key_values"),
        ({"prompt_lookup_num_tokens": 3}, "assisted"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1]])}, "attention_mask"),
    ],
)
def test_a_call_that_cannot_be_served(
    keep: Any, model: Any, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(InputError, match=why):
        keep(model).generate(tokens(4), **options)


@pytest.mark.parametrize(
    "ids", [tokens(8).view(2, 4), tokens(4)[0], tokens(4)[:, :0], tokens(4).float()]
)
def test_prompts_that_are_not_one_prompt(keep: Any, model: Any, ids: torch.Tensor) -> None:
    with pytest.raises(InputError):
        keep(model).generate(ids)


def test_the_fingerprint_names_weights_and_config() -> None:
    first = tiny_llama()
    assert fingerprint(first) == fingerprint(tiny_llama())
    assert fingerprint(first) != fingerprint(tiny_llama(seed=1))
    assert fingerprint(first) != fingerprint(tiny_llama(rms_norm_eps=1e-5))
    assert rope(first) == '{"rope_theta": 10000.0, "rope_type": "default"}'
    with torch.no_grad():
        first.model.layers[3].mlp.up_proj.weight[5, 5] += 1
    assert fingerprint(first) != fingerprint(tiny_llama())


def test_a_large_model_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    from tierloom.adapters import transformers_model as of

    whole = fingerprint(tiny_llama())
    monkeypatch.setattr(of, "WHOLE", 0)
    monkeypatch.setattr(of, "STRIP", 64)
    monkeypatch.setattr(of, "STRIPS", 4)
    sampled = fingerprint(tiny_llama())
    assert sampled not in (whole, fingerprint(tiny_llama(seed=1)))
    assert sampled == fingerprint(tiny_llama())
