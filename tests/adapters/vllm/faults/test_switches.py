"""What a request, an operator or vLLM itself may switch off, bound or reset."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from harness import Engine, pipeline, prompt, transfer

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Expect


@pytest.fixture
def plain(engine: Engine, llama: Path) -> Engine:
    engine.use(llama, transfer())
    engine.forget(connector=True)
    return engine


def test_skip_save(plain: Engine, expect: Expect) -> None:
    tokens = prompt(600, seed=300)
    expect(plain, tokens, cached=0, kv={"tierloom.skip_save": True})
    plain.settle()
    expect(plain, tokens, cached=0)
    plain.settle()
    expect(plain, tokens, cached=576, kv={"tierloom.skip_save": True})
    plain.settle()


def test_skip_load(plain: Engine, expect: Expect) -> None:
    tokens = prompt(600, seed=301)
    expect(plain, tokens, cached=0, kv={"tierloom.skip_load": True})
    plain.settle()
    expect(plain, tokens, cached=0, kv={"tierloom.skip_load": True})
    expect(plain, tokens, cached=576)
    plain.settle()


def test_max_tokens(plain: Engine, expect: Expect) -> None:
    """Of this request at most so many tokens are stored, and loaded."""
    tokens = prompt(1000, seed=302)
    expect(plain, tokens, cached=0, kv={"tierloom.max_tokens": 300})
    plain.settle()
    expect(plain, tokens, cached=288, kv={"tierloom.skip_save": True})
    expect(plain, tokens, cached=288)
    plain.settle()
    expect(plain, tokens, cached=992)
    expect(plain, tokens, cached=512, kv={"tierloom.max_tokens": 512})
    plain.settle()


def test_nonsense_is_refused_or_left_out(plain: Engine, expect: Expect) -> None:
    """A request with switches that make no sense gets its answer all the same."""
    tokens = prompt(600, seed=303)
    for kv in (
        {"tierloom.skip_save": "perhaps"},
        {"tierloom.tags": ["a", "b"]},
        {"tierloom.max_tokens": "many"},
        {"tierloom.max_tokens": -5},
        {"tierloom.unknown": 1},
        {"remote_host": "somewhere", "do_remote_prefill": False},
    ):
        expect(plain, tokens, kv=kv)
    plain.settle()


def test_min_tokens(engine: Engine, llama: Path, expect: Expect) -> None:
    engine.use(llama, transfer(**{"tierloom.min_tokens": 256}))
    short, long = prompt(200, seed=304), prompt(600, seed=305)
    for cached in (0, 576):
        expect(engine, short, cached=0)
        expect(engine, long, cached=cached)
        engine.settle()


def test_reset(plain: Engine, expect: Expect) -> None:
    tokens = prompt(600, seed=306)
    expect(plain, tokens, cached=0)
    plain.settle()
    plain.forget()
    expect(plain, tokens, cached=576)
    plain.settle()
    assert plain.ask("reset")
    expect(plain, tokens, cached=0)
    plain.settle()
    expect(plain, tokens, cached=576)
    plain.settle()


def test_reset_of_an_idle_engine(
    engine: Engine, llama: Path, expect: Expect, tmp_path: Path
) -> None:
    """It is done when it says so: a kill right behind it brings nothing back."""
    kv = transfer("tiered", **{"tiers.warm.path": str(tmp_path)})
    tokens = prompt(600, seed=308)
    expect(engine.use(llama, kv), tokens, cached=0)
    engine.settle()
    assert engine.ask("reset")
    engine.kill()
    expect(engine.use(llama, kv), tokens, cached=0)
    engine.settle()
    engine.kill()
    engine.use(llama, kv)
    assert engine.ask("reset"), "before the first step, too"
    expect(engine, tokens, cached=0)
    engine.settle()


@pytest.mark.parametrize(("reset", "cached"), [("local", 576), ("all", 0), ("none", 576)])
def test_which_tiers_a_reset_forgets(
    engine: Engine, llama: Path, expect: Expect, tmp_path: Path, reset: str, cached: int
) -> None:
    """`files` may be shared with other engines: it stays, unless all is to go."""
    files = {"use": "files", "path": str(tmp_path / "kv")}
    hot = {"use": "memory", "capacity": "64 MiB"}
    engine.use(llama, transfer(pipeline(hot=hot, cold=files), **{"tierloom.reset": reset}))
    tokens = prompt(600, seed=309)
    expect(engine, tokens, cached=0)
    engine.settle()
    before = engine.ask("metrics").get("vllm:tierloom_hit_tokens{tier=hot}", 0.0)
    assert engine.ask("reset")
    expect(engine, tokens, cached=cached)
    after = engine.ask("metrics").get("vllm:tierloom_hit_tokens{tier=hot}", 0.0)
    assert after - before == (576 if reset == "none" else 0)
    engine.settle()


def test_a_reset_that_a_tier_refuses_is_told(engine: Engine, llama: Path, expect: Expect) -> None:
    hot = {"use": "memory", "capacity": "64 MiB"}
    nobody = {"use": "redis", "url": "redis://127.0.0.1:9/0"}
    engine.use(llama, transfer(pipeline(hot=hot, deaf=nobody), **{"tierloom.reset": "all"}))
    expect(engine, prompt(600, seed=311), cached=0)
    assert not engine.ask("reset")
    assert "not cleared: deaf" in engine.log_text()


def test_prompt_logprobs_are_computed(plain: Engine, expect: Expect) -> None:
    """They need the whole prompt: vLLM takes no hit, and says so after it has asked for one."""
    tokens = prompt(600, seed=307)
    expect(plain, tokens, cached=0)
    plain.settle()
    expect(plain, tokens, cached=0, prompt_logprobs=1)
    expect(plain, tokens, cached=576)
    plain.settle()


def test_blocks_held_for_saving_come_back(engine: Engine, llama: Path, expect: Expect) -> None:
    """A tier that takes seconds to put: finished requests' blocks are not held for so long."""
    slow = {"use": "slow", "capacity": "64 MiB", "delay": "2 s"}
    kv = transfer(pipeline(hot=slow), **{"tierloom.hold": "300 ms"})
    engine.use(llama, kv, kv_cache_memory_bytes=64 * 32 * 2048, max_model_len=1984)
    for i in range(4):
        expect(engine, prompt(1500, seed=310 + i), cached=0)
    engine.settle()


def test_what_it_counts(plain: Engine, expect: Expect) -> None:
    """vLLM's own metrics and ours tell where tokens came from."""
    tokens = prompt(1000, seed=320)
    before = plain.ask("metrics")
    expect(plain, tokens, cached=0)
    plain.settle()
    expect(plain, tokens, cached=992)
    plain.settle()
    after = plain.ask("metrics")

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert grown("vllm:external_prefix_cache_hits") == 992
    assert grown("vllm:prompt_tokens_by_source{source=external_kv_transfer}") == 992
    assert grown("vllm:prompt_tokens_cached_by_source{source=host}") == 992
    assert grown("vllm:tierloom_loads") == 1
    assert grown("vllm:tierloom_load_tokens") == 992
    assert grown("vllm:tierloom_hit_tokens{tier=hot}") == 992
    assert grown("vllm:tierloom_store_tokens") == 992
    assert grown("vllm:tierloom_load_failed_tokens") == 0
