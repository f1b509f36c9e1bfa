"""Engines of different block sizes share what is kept in canonical order, not in native order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness import Engine, prompt, transfer

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Expect


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
