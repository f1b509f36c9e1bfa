"""Ever new combinations of the same passages do not flood a store that evicts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from conftest import Engine, config, tokens

from .blends import blending, opened_with

if TYPE_CHECKING:
    from conftest import Open

PASSAGES, PICKED, PROMPTS, CHUNK = 150, 14, 300, 256


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["what is new", "all of it", "by name"])
def test_new_orders_of_kept_passages_are_found_as_often_as_at_first(
    opened: Open, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    """Passages of 200 to 400 tokens, a store of 1.5 times their KV. Where prompts are kept whole,
    as prefixes are, new prompts push one another out; by name alone nothing of them is found."""
    rng = np.random.default_rng(3)
    passages = [tokens(int(rng.integers(200, 400)), seed) for seed in range(PASSAGES)]
    system = tokens(64, PASSAGES)
    engine = Engine(layers=1, heads=1, dim=8, blocks=360, dtype=torch.float32)
    capacity = int(1.5 * sum(map(len, passages)) * 2 * 8 * 4)
    source = config(chunk={"tokens": CHUNK, "grain": 32, "group": 1}, tiers__hot__capacity=capacity)
    source = blending(source)
    if kept == "by name":
        del source["graphs"]["store"]["stages"]["fresh"]["by"]
    elif kept == "all of it":
        monkeypatch.setattr("tierloom.stages.passages.fresh.OPENING", 0)
    pipe, at = opened_with(opened, source, engine), engine.slots(360 * 16)
    shares, stored = [], []
    for _ in range(PROMPTS if kept == "what is new" else 120):
        picked = rng.permutation(PASSAGES)[:PICKED]
        prompt = np.concatenate([system, *(passages[i] for i in picked)])
        to = at[: len(prompt)]
        got = pipe.retrieve(prompt, engine.caches, to, blend=True).wait()
        assert got.lost == {}
        exact = got.tokens if got.blended and kept == "what is new" else len(prompt)
        receipt = pipe.store(prompt, engine.caches, to, exact=exact).wait()
        shares.append(got.blended / (len(prompt) - len(system)))
        stored.append(receipt.tiers.get("hot", 0))
    first, last = np.mean(shares[:100]), np.mean(shares[-100:])
    if kept == "what is new":
        assert last >= 0.95 * first
        assert last > 0.85
        assert sum(stored[-100:]) < PASSAGES / 2
    else:
        assert last < 0.75
