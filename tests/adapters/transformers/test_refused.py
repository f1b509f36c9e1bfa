"""What cannot be kept is refused before anything is opened, with the reason."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XLMConfig,
    XLMWithLMHeadModel,
)  # fmt: skip

from tierloom.adapters.transformers.cached_model import CachedModel
from tierloom.adapters.transformers.model import fingerprint, rope, shape_of
from tierloom.stages.errors import InputError, LayoutError

from .conftest import greedy, spread, tiny_llama, tokens

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
        (lambda: spread(BertLMHeadModel(BertConfig(**SMALL))), "answers differently"),
        (
            lambda: XLMWithLMHeadModel(
                XLMConfig(vocab_size=300, emb_dim=64, n_layers=2, n_heads=4)
            ),
            "xlm fails if it is run with a cache",
        ),
    ],
)
def test_a_model_whose_kv_cannot_be_kept(make: Callable[[], Any], why: str) -> None:
    with pytest.raises(LayoutError, match=why):
        CachedModel(make().eval())


def test_a_model_in_training_mode() -> None:
    with pytest.raises(InputError, match=r"model\.eval"):
        CachedModel(tiny_llama().train())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
        lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=4, n_head=4)),
    ],
)
def test_other_models_with_full_attention_have_a_shape(make: Callable[[], Any]) -> None:
    shape = shape_of(make().eval())
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
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, "pixel_values= goes to the model itself"),
        ({"encoder_hidden_states": torch.zeros(1, 4, 64)}, "made of token ids alone"),
        ({"token_healing": True}, "token_healing"),
        ({"custom_generate": lambda *_, **__: None}, "custom_generate"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "num_beams"),
        ({"generation_config": GenerationConfig(use_mtp=True)}, "assisted"),
    ],
)
def test_a_call_that_cannot_be_served(
    keep: Any, model: Any, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(InputError, match=why):
        keep(model).generate(tokens(4), **options)


def test_what_the_model_s_own_config_asks_for_counts(keep: Any) -> None:
    """transformers takes from it what the config of the call leaves out."""
    one = tiny_llama(num_hidden_layers=2)
    one.generation_config.num_beams = 2
    with pytest.raises(InputError, match="num_beams"):
        keep(one).generate(tokens(4), generation_config=GenerationConfig(max_new_tokens=4))


@pytest.mark.parametrize("place", ["config", "made with", "generation_config", "given", "static"])
def test_use_cache_is_ours_to_say(keep: Any, place: str) -> None:
    options: dict[str, Any] = {}
    one = spread(tiny_llama(num_hidden_layers=2, use_cache=place != "made with"))
    if place == "config":
        one.config.use_cache = False
    elif place == "generation_config":
        one.generation_config.use_cache = False
    elif place == "given":
        options["generation_config"] = GenerationConfig(
            use_cache=False, max_new_tokens=12, do_sample=False, pad_token_id=0
        )
    elif place == "static":
        one.generation_config.cache_implementation = "static"
    kept = keep(one)
    want = greedy(spread(tiny_llama(num_hidden_layers=2)), tokens(300)).tolist()
    options = options or {"max_new_tokens": 12, "do_sample": False}
    for hit in (0, 288):
        assert kept.generate(tokens(300), **options).tolist() == want
        assert kept.last.hit_tokens == hit
        kept.flush()
    if one.config.use_cache is False:
        with pytest.raises(InputError, match=r"set model\.config\.use_cache = True"):
            kept.cache(tokens(300))
    if place == "given":
        assert options["generation_config"].use_cache is False, "it is the caller's"


def test_a_model_that_is_run_over_all_tokens_again(
    keep: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would be if it were generated without a cache."""
    kept = keep(model)
    prepare = LlamaForCausalLM.prepare_inputs_for_generation

    @wraps(prepare)
    def all_of_it(self: Any, ids: torch.Tensor, **options: Any) -> Any:
        return prepare(self, ids, **options | {"next_sequence_length": None})

    monkeypatch.setattr(LlamaForCausalLM, "prepare_inputs_for_generation", all_of_it)
    with pytest.raises(LayoutError, match="run over 301 tokens, but 1 were left"):
        kept.generate(tokens(300), max_new_tokens=4, do_sample=False)


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
    from tierloom.adapters.transformers import model as of

    whole = fingerprint(tiny_llama())
    monkeypatch.setattr(of, "WHOLE", 0)
    monkeypatch.setattr(of, "STRIP", 64)
    monkeypatch.setattr(of, "STRIPS", 4)
    sampled = fingerprint(tiny_llama())
    assert sampled not in (whole, fingerprint(tiny_llama(seed=1)))
    assert sampled == fingerprint(tiny_llama())


def test_the_old_name_still_works_and_warns() -> None:
    import tierloom.adapters.transformers as face

    with pytest.warns(DeprecationWarning, match="Kept is now CachedModel"):
        assert face.Kept is CachedModel
