"""Speculative decoding: a drafter's tokens are refused again, and a step's hooks come in another
order; what is kept, and what is read, is what was accepted."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
from harness import Engine, prompt, transfer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Expect

REST = [pytest.mark.campaign]
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
KINDS = [
    pytest.param(
        *kind, marks=[] if kind in (("ngram", "step", True), ("draft", "layer", True)) else REST
    )
    for kind in itertools.product(("ngram", "draft"), ("step", "layer"), (True, False))
]


@pytest.fixture(autouse=True)
def alone(engine: Engine) -> Iterator[None]:
    """Engines that come after a drafter in its process take several times as long for a step."""
    yield
    engine.close()


def speculative(kind: str, model: Path) -> dict[str, Any]:
    if kind == "ngram":
        return NGRAM
    return {"method": "draft_model", "model": str(model), "num_speculative_tokens": 3}


@pytest.mark.parametrize(("kind", "save", "decode"), KINDS)
def test_continued_conversations(
    engine: Engine, llama: Path, expect: Expect, kind: str, save: str, decode: bool
) -> None:
    """Several at once, so that the blocks of one that has ended are another's at once."""
    kv = transfer(**{"tierloom.save": save, "tierloom.save_decode": decode})
    engine.use(
        llama, kv, speculative_config=speculative(kind, llama), kv_cache_memory_bytes=16 << 20,
        max_num_batched_tokens=256, max_model_len=2048,
    )  # fmt: skip
    prompts = [(prompt(40 + 9 * i, seed=460 + i) * 8)[: 150 + 70 * i] for i in range(4)]
    answers = engine.generate(*prompts, max_tokens=40)
    engine.settle()
    for tokens, answer in zip(prompts, answers, strict=True):
        history = tokens + answer.ids
        kept = (len(history) - 1 if decode else len(tokens)) // 32 * 32
        expect(engine, tokens, max_tokens=40)
        expect(engine, [*history, 7, 8, 9], cached=kept, max_tokens=12)
        engine.settle()


def test_a_draft_models_layers_have_names_of_their_own(
    engine: Engine, llama: Path, expect: Expect, tmp_path: Path
) -> None:
    """What was kept without them is not taken for what has them, nor the other way round."""
    kv = transfer("tiered", **{"tiers.warm.path": str(tmp_path)})
    tokens = prompt(600, seed=470)
    for draft, cached in ((None, 0), ("draft", 0), (None, 576), ("draft", 576)):
        more = {"speculative_config": speculative(draft, llama)} if draft else {}
        expect(engine.use(llama, kv, **more), tokens, cached=cached)
        engine.settle()
