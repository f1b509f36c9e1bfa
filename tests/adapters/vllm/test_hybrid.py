"""Sliding-window layers beside full ones, two KV groups: kept, or refused with a reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import models
import pytest
from harness import Engine, prompt, transfer

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Reference


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.gemma(tmp_path_factory.mktemp("gemma") / "model")


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("load", ["async", "layer"])
def test_sliding_window(
    engine: Engine, gemma: Path, reference: Reference, load: str, prefix_caching: bool
) -> None:
    kv = transfer(**{"tierloom.load": load, "tierloom.save_decode": True})
    log, begun = engine.log, len(engine.log_text()) if engine.log.exists() else 0
    engine.use(gemma, kv, enable_prefix_caching=prefix_caching)
    begun = begun if engine.log == log else 0
    prompts = [prompt(n, seed=440 + n) for n in (60, 300, 1000)]
    right = [reference(t, model=gemma, max_tokens=12) for t in prompts]
    assert len({tuple(ids) for ids in right}) == 3, "the model does not look at its prompt"
    cached = []
    for _ in range(2):
        for tokens, ids in zip(prompts, right, strict=True):
            answer = engine.one(tokens, max_tokens=12)
            assert answer.ids == ids
            cached.append(answer.cached)
        assert [a.ids for a in engine.generate(*prompts, max_tokens=12)] == right
        engine.settle()
        engine.forget()
    said = [ln for ln in engine.log_text()[begun:].splitlines() if "caching is off" in ln]
    if cached[-1]:
        assert cached[-1] == 992
    else:
        assert len(said) == 1, said
