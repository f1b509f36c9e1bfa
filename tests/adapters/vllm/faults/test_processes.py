"""Scheduler and workers in processes of their own: what they tell each other is pickled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from harness import Engine, prompt, transfer

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Expect, Reference

# (environment, options): front | core | worker; front and core | two workers. vLLM 0.32 cannot run
# pipeline parallel on a CPU: its runner there asserts, with or without a connector.
SHAPES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "three processes": ({"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, {}),
    "two tensor parallel workers": ({"TIERLOOM_TEST": "tp"}, {"tensor_parallel_size": 2}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_repeat_and_restart(
    engine: Engine, llama: Path, expect: Expect, reference: Reference, tmp_path: Path, shape: str
) -> None:
    env, options = SHAPES[shape]
    options["max_num_batched_tokens"] = 512
    kv = transfer("tiered", **{"tiers.warm.path": str(tmp_path / "kv")})
    tokens = prompt(1000, seed=400)
    reached = "a worker could not be reached, or did not do it"
    expect(engine.use(llama, kv), tokens, cached=0)  # in one process: it starts in no time
    engine.settle()
    engine.use(llama, kv, env=env, **options)
    assert engine.ask("reset"), f"{reached} before the first step"
    expect(engine, tokens, cached=0)
    state = engine.settle()
    assert len(state["workers"]) == options.get("tensor_parallel_size", 1)
    expect(engine, tokens, cached=992)
    expect(engine, tokens[:500] + prompt(300, seed=401), cached=480)
    many = [prompt(300 + 50 * i, seed=402 + i) for i in range(5)]
    right = [reference(t, max_tokens=20) for t in many]
    for _ in range(2):
        assert [a.ids for a in engine.generate(*many, max_tokens=20)] == right
        engine.settle()
    names = [engine.add(t, max_tokens=50) for t in many]
    engine.ask("step", times=3)
    engine.ask("abort", names=names[:3])
    assert [a.ids[:20] for a in engine.finish(*names)[3:]] == right[3:]
    engine.settle()
    if "tensor_parallel_size" in options:
        assert engine.ask("reset"), reached
        expect(engine, tokens, cached=0)
        engine.settle()
        engine.use(llama, kv)  # half the heads are not the whole
        expect(engine, tokens)
        engine.settle()
    else:
        engine.use(llama, kv, env=env, fresh=True, **options)
        expect(engine, tokens, cached=992)
        engine.settle()
        engine.use(llama, kv)  # the same KV, in however many processes: the reset was of this
    expect(engine, tokens, cached=992)
    engine.settle()
    engine.close()
