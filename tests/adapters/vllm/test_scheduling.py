"""Chunked prefill, preemption, aborts: the ids are right and nothing stays behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from harness import Engine, pipeline, prompt, transfer

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Expect, Reference

LOADS = pytest.mark.parametrize("load", ["async", "layer"])


@LOADS
def test_chunked_prefill(engine: Engine, llama: Path, expect: Expect, load: str) -> None:
    engine.use(llama, transfer(**{"tierloom.load": load}), max_num_batched_tokens=512)
    tokens = prompt(2000, seed=41)
    expect(engine, tokens, cached=0)
    engine.settle()
    expect(engine, tokens, cached=1984)
    longer = tokens + prompt(1500, seed=42)
    expect(engine, longer, cached=2000 // 32 * 32)
    engine.settle()
    expect(engine, longer, cached=3488)
    engine.settle()


@LOADS
def test_chunks_of_several_requests_in_one_step(
    engine: Engine, llama: Path, reference: Reference, load: str
) -> None:
    engine.use(llama, transfer(**{"tierloom.load": load}), max_num_batched_tokens=512)
    prompts = [prompt(700 + 37 * i, seed=43 + i) for i in range(4)]
    right = [reference(tokens, max_tokens=16) for tokens in prompts]
    assert [a.ids for a in engine.generate(*prompts, max_tokens=16)] == right
    engine.settle()
    again = engine.generate(*prompts, max_tokens=16)
    assert [a.ids for a in again] == right
    assert [a.cached for a in again] == [(len(t) - 1) // 32 * 32 for t in prompts]
    engine.settle()


@LOADS
@pytest.mark.parametrize("decode", [False, True])
def test_preemption(
    engine: Engine, llama: Path, reference: Reference, load: str, decode: bool
) -> None:
    """Six requests, each of which needs a fifth of the KV cache in the end."""
    kv = transfer(**{"tierloom.load": load, "tierloom.save_decode": decode})
    engine.use(llama, kv, kv_cache_memory_bytes=100 * 32 * 2048, max_model_len=2048)
    prompts = [prompt(500 + i, seed=50 + i) for i in range(6)]
    right = [reference(tokens, max_tokens=150) for tokens in prompts]
    before = engine.ask("metrics")["vllm:num_preemptions"]
    for _ in range(2):
        assert [a.ids for a in engine.generate(*prompts, max_tokens=150)] == right
        engine.settle()
    assert engine.ask("metrics")["vllm:num_preemptions"] > before


SLOW = {"use": "slow", "capacity": "64 MiB", "delay": "300 ms"}


@pytest.fixture
def slow(engine: Engine, llama: Path) -> Engine:
    """An engine whose loads take many steps."""
    engine.use(llama, transfer(pipeline(hot=SLOW)), max_num_batched_tokens=512)
    engine.forget(connector=True)
    return engine


def test_abort_during_load(slow: Engine, expect: Expect) -> None:
    tokens = prompt(1000, seed=61)
    expect(slow, tokens, cached=0)
    slow.settle()
    for steps in (0, 1, 2, 5):
        name = slow.add(tokens)
        assert slow.ask("step", times=steps).get(name) == 0, "it was loaded too soon to be aborted"
        slow.ask("abort", names=[name])
        assert slow.finish(name)[0].reason == "abort"
        slow.settle()
    expect(slow, tokens, cached=992)
    slow.settle()


def test_abort_of_one_while_others_load(slow: Engine, expect: Expect, reference: Reference) -> None:
    prompts = [prompt(600, seed=62 + i) for i in range(3)]
    for tokens in prompts:
        expect(slow, tokens, cached=0)
    slow.settle()
    names = [slow.add(tokens) for tokens in prompts]
    slow.ask("step", times=3)
    slow.ask("abort", names=[names[1]])
    first, second, third = slow.finish(*names)
    assert second.reason == "abort"
    assert [first.ids, third.ids] == [reference(prompts[0]), reference(prompts[2])]
    assert [first.cached, third.cached] == [576, 576]
    slow.settle()


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_abort_while_it_is_computed_and_stored(slow: Engine, expect: Expect, steps: int) -> None:
    """Within the chunked prefill and just after it, with a store under way."""
    tokens = prompt(1400, seed=70 + steps)
    name = slow.add(tokens, max_tokens=20)
    slow.ask("step", times=steps)
    slow.ask("abort", names=[name])
    other = prompt(500, seed=80 + steps)
    expect(slow, other)  # takes the blocks that have become free
    slow.settle()
    expect(slow, tokens)  # whatever of it was stored is right
    expect(slow, other, cached=480)
    slow.settle()


def test_abort_of_everything(slow: Engine) -> None:
    names = [slow.add(prompt(300 + i, seed=90 + i), max_tokens=40) for i in range(20)]
    slow.ask("step", times=4)
    slow.ask("abort", names=names)
    assert {a.reason for a in slow.finish(*names)} == {"abort"}
    slow.settle()


def test_priority(engine: Engine, llama: Path, reference: Reference) -> None:
    """A request that matters more pushes out one that is under way."""
    engine.use(
        llama,
        transfer(),
        kv_cache_memory_bytes=64 * 32 * 2048,
        max_model_len=1984,
        scheduling_policy="priority",
    )
    low: list[dict[str, Any]] = [
        {"tokens": prompt(600, seed=100 + i), "priority": 10} for i in range(3)
    ]
    names = [engine.add(**request, max_tokens=80) for request in low]
    engine.ask("step", times=6)
    high = engine.add(prompt(900, seed=110), max_tokens=80, priority=0)
    found = engine.finish(*names, high)
    right = [reference(r["tokens"], max_tokens=80) for r in low]
    right.append(reference(prompt(900, seed=110), max_tokens=80))
    assert [a.ids for a in found] == right
    engine.settle()
