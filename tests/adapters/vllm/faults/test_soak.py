"""200 random requests with aborts, preemptions and tiers that fail and lie: every id is right."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from harness import Engine, pipeline, prompt, transfer

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Reference

REQUESTS = 200
LONGEST = 40  # tokens of an answer
TIERS = {
    "hot": {"use": "memory", "capacity": "3 MiB"},
    "warm": {"use": "flaky", "capacity": "8 MiB", "rate": 0.15, "seed": 1, "corrupt": True},
    "cold": {"use": "flaky", "capacity": "16 MiB", "rate": 0.15, "seed": 2, "probe": "100 ms"},
}


def prompts() -> list[list[int]]:
    """Sixty, of eight families: heads of a family's document with tails of their own."""
    chance = random.Random(7)
    made = []
    for i in range(60):
        head = prompt(1100, seed=500 + i % 8)[: chance.randrange(20, 1100)]
        made.append(head + prompt(chance.randrange(1, 120), seed=520 + i))
    return made


@pytest.mark.parametrize(("load", "prefix_caching"), [("async", True), ("layer", False)])
def test_soak(
    engine: Engine, llama: Path, reference: Reference, load: str, prefix_caching: bool
) -> None:
    engine.use(
        llama,
        transfer(pipeline(**TIERS), **{"tierloom.load": load, "tierloom.save_decode": True}),
        kv_cache_memory_bytes=100 * 32 * 2048,
        max_model_len=2048,
        max_num_batched_tokens=512,
        enable_prefix_caching=prefix_caching,
    )
    before = engine.ask("metrics")
    chance = random.Random(11)
    known = prompts()
    asked: dict[str, tuple[list[int], int]] = {}
    open_: list[str] = []
    aborted: set[str] = set()
    wrong = []
    while len(asked) < REQUESTS or open_:
        while len(asked) < REQUESTS and len(open_) < 8 and chance.random() < 0.7:
            tokens, length = chance.choice(known), chance.randrange(1, LONGEST)
            name = engine.add(tokens, max_tokens=length)
            asked[name] = tokens, length
            open_.append(name)
        engine.ask("step", times=chance.randrange(1, 9))
        if open_ and chance.random() < 0.25:
            gone = chance.choice(open_)
            engine.ask("abort", names=[gone])
            aborted.add(gone)
        done = chance.sample(open_, min(len(open_), chance.randrange(3)))
        done += [name for name in open_ if name in aborted and name not in done]
        for name, answer in zip(done, engine.finish(*done) if done else [], strict=True):
            open_.remove(name)
            tokens, length = asked[name]
            right = reference(tokens, max_tokens=LONGEST)[:length]
            if name not in aborted and answer.ids != right:
                wrong.append((name, len(tokens), answer, right))
    assert not wrong
    assert len(aborted) > 15
    engine.settle()
    after = engine.ask("metrics")
    assert after["vllm:num_preemptions"] > before["vllm:num_preemptions"]
    hits = "vllm:external_prefix_cache_hits"
    assert after[hits] > before[hits]

    # With everything dropped that is kept, whatever lease is left belongs to nobody.
    engine.forget(connector=True)
    engine.one(prompt(20))
    state = engine.settle()
    assert state["workers"][0]["stats"]["arena"]["leases"] == 0
    assert state["scheduler"]["keys"] == 0
