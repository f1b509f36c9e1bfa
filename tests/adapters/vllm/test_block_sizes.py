"""Engines of different block sizes share what is kept in canonical order, not in native order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from harness import Engine, prompt, transfer

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Expect

ALWAYS = [(96, 256, 320), (128, 64, None)]
SIZES = [
    *ALWAYS, (160, 256, None), (160, 256, 320), (160, 64, 320), (160, 512, None), (96, 256, None),
    (96, 64, None), (96, 512, 320), (128, 64, 320), (128, 512, None), (512, 256, None),
    (512, 64, 320), (64, 32, None), (64, 32, 320),
]  # fmt: skip
"""Tokens of a block (on a CPU vLLM takes multiples of 32), of a chunk, of a step."""


@pytest.mark.parametrize(
    ("block", "chunk", "step"),
    [pytest.param(*s, marks=[] if s in ALWAYS else [pytest.mark.campaign]) for s in SIZES],
)
def test_prefixes_that_end_anywhere(
    engine: Engine, llama: Path, expect: Expect, tmp_path: Path, block: int, chunk: int,
    step: int | None,
) -> None:  # fmt: skip
    """Also where a block does not divide a chunk, nor a chunk a block; and what such an engine
    keeps is right for one with other blocks."""
    kv = transfer("tiered", **{
        "tiers.warm.path": str(tmp_path / "kv"), "order": "canonical", "chunk.tokens": chunk,
    })  # fmt: skip
    a, d = prompt(1000, seed=440), prompt(2100, seed=441)
    prompts = [a, a[:700] + prompt(600, seed=442), a[:256] + prompt(800, seed=443), d,
               d[:1111] + prompt(300, seed=444)]  # fmt: skip
    steps = {"max_num_batched_tokens": step} if step else {}
    engine.use(llama, kv, block_size=block, **steps)
    for _ in range(2):
        for tokens in prompts:
            expect(engine, tokens)
            engine.settle()
    least = 2100 // block * block - block
    assert expect(engine, d).cached >= min(least, 2048), "it was not kept"
    engine.use(llama, kv, block_size=32)
    for tokens in prompts:
        assert expect(engine, tokens).cached >= len(tokens) // 64 * 64 - 64
    engine.settle()


def test_canonical(engine: Engine, llama: Path, expect: Expect, tmp_path: Path) -> None:
    kv = transfer("tiered", **{"tiers.warm.path": str(tmp_path / "kv"), "order": "canonical"})
    tokens, other = prompt(1000, seed=430), prompt(1500, seed=431)
    expect(engine.use(llama, kv, block_size=32), tokens, cached=0)
    engine.settle()
    engine.use(llama, kv, block_size=128)
    expect(engine, tokens, cached=896)
    expect(engine, other, cached=0)
    engine.settle()
    expect(engine, other, cached=1408)
    engine.settle()
    engine.use(llama, kv, block_size=32)
    expect(engine, tokens, cached=992)
    assert expect(engine, other).cached >= 1408
    engine.settle()


def test_native(engine: Engine, llama: Path, expect: Expect, tmp_path: Path) -> None:
    kv = transfer("tiered", **{"tiers.warm.path": str(tmp_path / "kv"), "order": "native"})
    tokens = prompt(1000, seed=432)
    for size, cached in ((32, 0), (128, 0), (32, 992), (128, 896)):
        expect(engine.use(llama, kv, block_size=size), tokens, cached=cached)
        engine.settle()
