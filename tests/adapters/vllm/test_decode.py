"""What was said is kept, too: the next turn of a chat begins with the answer of the last one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from harness import Engine, prompt, transfer

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Expect


@pytest.mark.parametrize("keys", ["own", "engine"])
@pytest.mark.parametrize("load", ["async", "layer"])
def test_second_turn(engine: Engine, llama: Path, expect: Expect, load: str, keys: str) -> None:
    kv = {"tierloom.load": load, "tierloom.keys": keys, "tierloom.save_decode": True}
    engine.use(llama, transfer(**kv))
    for i, length in enumerate((200, 600)):
        history = prompt(length, seed=210 + i)
        said = expect(engine, history, cached=0, max_tokens=70).ids
        engine.settle()
        for turn in (1, 2):
            # the last token that was said has no KV yet
            kept = (len(history) + len(said) - 1) // 32 * 32
            history = history + said + prompt(40, seed=220 + turn)
            said = expect(engine, history, cached=kept, max_tokens=40).ids
            engine.settle()


def test_off(engine: Engine, llama: Path, expect: Expect) -> None:
    engine.use(llama, transfer(**{"tierloom.save_decode": False}))
    tokens = prompt(200, seed=230)
    said = expect(engine, tokens, cached=0, max_tokens=70).ids
    engine.settle()
    expect(engine, tokens + said, cached=192)


def test_many_turns_at_once(engine: Engine, llama: Path, expect: Expect) -> None:
    """Decode KV is saved while other requests prefill and decode in the same steps."""
    engine.use(llama, transfer(**{"tierloom.save_decode": True}), max_num_batched_tokens=256)
    prompts = [prompt(150 + 60 * i, seed=240 + i) for i in range(5)]
    answers = engine.generate(*prompts, max_tokens=80)
    engine.settle()
    for tokens, answer in zip(prompts, answers, strict=True):
        kept = (len(tokens) + 79) // 32 * 32
        expect(engine, tokens + answer.ids + [7, 8, 9], cached=kept)
    engine.settle()
