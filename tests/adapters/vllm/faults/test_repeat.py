"""Cold, repeated, longer, parted: in each way of loading and saving, vLLM's cache on and off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from harness import Engine, prompt, transfer

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Expect, Reference

# (options of the connector, options of the engine)
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "async": ({}, {}),
    "async, prefix caching": ({}, {"enable_prefix_caching": True}),
    "layer": ({"tierloom.load": "layer", "tierloom.save": "layer"}, {}),
    "layer, prefix caching": (
        {"tierloom.load": "layer", "tierloom.save": "layer"},
        {"enable_prefix_caching": True},
    ),
    "save by step": ({"tierloom.save": "step"}, {}),
    "keys of the engine": ({"tierloom.keys": "engine"}, {}),
    "blocks of 128": ({}, {"block_size": 128}),
}


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def running(way: str, engine: Engine, llama: Path) -> Engine:
    """An engine of this way that remembers nothing."""
    kv, options = WAYS[way]
    engine.use(llama, transfer(**kv), **options)
    engine.forget(connector=True)
    return engine


@pytest.fixture(scope="module")
def block(way: str) -> int:
    return int(WAYS[way][1].get("block_size", 32))


def whole(tokens: int, block: int) -> int:
    """Tokens of a prompt that can be loaded: whole blocks, and never the last token."""
    return (tokens - 1) // block * block


@pytest.mark.parametrize("length", [1000, 1024, 2049])
def test_repeat(running: Engine, expect: Expect, block: int, length: int) -> None:
    tokens = prompt(length, seed=length)
    expect(running, tokens, cached=0)
    running.settle()
    running.forget()
    before = running.ask("metrics")
    expect(running, tokens, cached=whole(length, block))
    running.settle()
    after = running.ask("metrics")
    loaded = "vllm:tierloom_load_tokens"
    assert after[loaded] - before.get(loaded, 0) == whole(length, block)


@pytest.mark.parametrize("length", [1, 32, 33, 129])
def test_short_prompts(running: Engine, expect: Expect, block: int, length: int) -> None:
    tokens = prompt(length, seed=900 + length)
    expect(running, tokens, cached=0)
    running.settle()
    running.forget()
    expect(running, tokens, cached=whole(length, block))


def test_longer_by_a_suffix(running: Engine, expect: Expect, block: int) -> None:
    tokens = prompt(900, seed=2)
    expect(running, tokens, cached=0)
    running.settle()
    running.forget()
    expect(running, tokens + prompt(300, seed=3), cached=900 // block * block)
    running.settle()
    running.forget()
    expect(running, tokens + prompt(300, seed=3), cached=whole(1200, block))


def test_leaving_it_in_the_middle(running: Engine, expect: Expect, block: int) -> None:
    tokens = prompt(1000, seed=4)
    expect(running, tokens, cached=0)
    running.settle()
    running.forget()
    other = tokens[:650] + prompt(300, seed=5)
    answer = expect(running, other)
    assert 512 <= answer.cached <= 650
    assert answer.cached % block == 0


def test_two_that_share_a_prefix_in_one_batch(
    running: Engine, reference: Reference, block: int
) -> None:
    shared = prompt(640, seed=6)
    both = [shared + prompt(100, seed=7), shared + prompt(150, seed=8)]
    right = [reference(tokens) for tokens in both]
    assert [a.ids for a in running.generate(*both)] == right
    running.settle()
    running.forget()
    again = running.generate(*both)
    assert [a.ids for a in again] == right
    # the one that comes second may find the first one's blocks in vLLM's own cache
    assert [a.cached for a in again] == [whole(740, block), whole(790, block)]
    running.settle()


def test_many_at_once(running: Engine, reference: Reference, block: int) -> None:
    prompts = [prompt(200 + 90 * i, seed=20 + i) for i in range(7)]
    right = [reference(tokens, max_tokens=24) for tokens in prompts]
    assert [a.ids for a in running.generate(*prompts, max_tokens=24)] == right
    running.settle()
    running.forget()
    again = running.generate(*prompts, max_tokens=24)
    assert [a.ids for a in again] == right
    assert [a.cached for a in again] == [whole(len(tokens), block) for tokens in prompts]
    running.settle()


def test_beyond_vllms_own_prefix_cache(
    running: Engine, expect: Expect, way: str, block: int
) -> None:
    """vLLM has the head, tierloom what comes after it."""
    if "prefix caching" not in way:
        pytest.skip("vLLM's prefix caching is off")
    tokens = prompt(1000, seed=9)
    expect(running, tokens, cached=0)
    running.settle()
    running.forget()
    expect(running, tokens[:330], cached=whole(330, block))  # now in vLLM's cache, too
    before = running.ask("metrics")
    expect(running, tokens, cached=whole(1000, block))
    after = running.ask("metrics")
    hits = "vllm:external_prefix_cache_hits"
    assert after[hits] - before[hits] == whole(1000, block) - 320
    running.settle()
