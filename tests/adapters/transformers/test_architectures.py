"""Every causal LM of transformers says the same with `CachedModel`, or is refused by name.

A few run always; all of them with `make architectures`, or `-m campaign`.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tierloom.adapters.transformers.cached_model import CachedModel
from tierloom.stages.errors import LayoutError

from .architectures import OWN, REFUSED, UNBUILT, VARIANTS, build, names
from .conftest import tokens

if TYPE_CHECKING:
    from collections.abc import Callable

LENGTHS = (1, 31, 32, 33, 63, 64, 65, 100, 200)
"""About the bounds of chunks of 64 tokens and grains of 32."""
SMALL = {
    "tiers.hot.capacity": "64 MiB", "budget.arena": "64 MiB",
    "chunk.tokens": 64, "chunk.grain": 32,
    "graphs.store.deadline": "60 s", "graphs.retrieve.deadline": "60 s",
}  # fmt: skip
NOISE = 1e-3
"""How far logits may be off, as a share of the largest: float32, summed in another order."""

ALWAYS = {
    "bert, not a decoder", "bloom", "cohere", "falcon, alibi", "gpt2", "gpt_neo", "llama, no cache",
    "mamba", "mixtral", "mpt", "opt", "phi", "prophetnet", "qwen2, window", "xglm", "xlm",
}  # fmt: skip
"""One of each kind: ALiBi, learned, sinusoidal and rotary positions, experts, a mask of its own for
each layer, one head for all, a config without cache; and of each kind of refusal."""


def everyone() -> list[Any]:
    return [
        pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.campaign])
        for name in sorted({*names(), *VARIANTS})
    ]


@pytest.mark.parametrize("name", everyone())
@pytest.mark.timeout(600)
def test_it_says_the_same_or_is_refused(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, of models that nobody keeps up
        if name in UNBUILT:
            with pytest.raises(Exception):  # noqa: B017 - whatever its class raises
                build(name)
            return
        model = build(name)
        if name in REFUSED:
            with pytest.raises(LayoutError, match=REFUSED[name]):
                CachedModel(model, config="minimal", overrides=SMALL)
            return
        with CachedModel(model, config="minimal", overrides=SMALL, store_decode=True) as kept:
            compare(model, kept)


def compare(model: Any, kept: CachedModel) -> None:
    """Cold, warm, with another end, and longer; each against the model alone."""
    said: dict[int, torch.Tensor] = {}
    for n in LENGTHS:
        prompt = tokens(n, seed=n)
        said[n] = one(model, kept, prompt)
        one(model, kept, prompt)
        assert kept.last.hit_tokens == (n - 1) // 32 * 32
        if n > 40:
            one(model, kept, torch.cat([prompt[:, : n // 2 + 5], tokens(n - n // 2 - 5, 7)], 1))
            one(model, kept, torch.cat([prompt, tokens(20, 8)], 1))
            assert kept.last.hit_tokens >= n // 32 * 32
    more = torch.cat([tokens(200, 200), tokens(40, 9)], 1)
    one(model, kept, more, prefill_chunk_size=16)
    assert kept.last.hit_tokens == 192
    other = torch.cat([tokens(32, 99), tokens(100, 100)[:, 32:]], 1)
    assert off(one(model, kept, other), said[100]) > 3 * NOISE, "it does not see its own KV"


def one(model: Any, kept: CachedModel, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
    """The logits of four tokens, which are as without a cache of ours."""
    mask = torch.ones_like(prompt)
    ids, want = answer(model.generate, prompt, attention_mask=mask)
    said, logits = answer(kept.generate, prompt, **options)
    kept.flush()
    assert off(logits, want) < NOISE, (prompt.shape, kept.last)
    assert said == ids
    return want


def answer(
    generate: Callable[..., Any], prompt: torch.Tensor, **options: Any
) -> tuple[list[int], torch.Tensor]:
    out = generate(
        prompt, max_new_tokens=4, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **options,
    )  # fmt: skip
    return out.sequences[0].tolist(), torch.stack(out.logits).float()


def off(logits: torch.Tensor, want: torch.Tensor) -> float:
    return float((logits - want).abs().max() / want.abs().max())


def test_the_names_are_transformers_own() -> None:
    assert set(names()) == {config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING}
    assert {*names(), *VARIANTS} >= ALWAYS
    assert not (OWN.keys() | {base for base, _ in VARIANTS.values()}) - set(names())
