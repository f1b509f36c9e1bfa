"""Salt, LoRA and tags: what one tenant or adapter has stored, no other finds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import models
import pytest
from harness import Engine, prompt, transfer

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Expect, Reference

KEYS = pytest.mark.parametrize("keys", ["own", "engine"])


@KEYS
def test_salt(engine: Engine, llama: Path, expect: Expect, keys: str) -> None:
    engine.use(llama, transfer(**{"tierloom.keys": keys}))
    tokens = prompt(1000, seed=200)
    for salt in ("one", "other", None):
        expect(engine, tokens, cached=0, salt=salt)
        engine.settle()
    for salt in (None, "other", "one"):
        expect(engine, tokens, cached=992, salt=salt)
    expect(engine, tokens, cached=0, salt="third")
    engine.settle()


@KEYS
def test_tags(engine: Engine, llama: Path, expect: Expect, keys: str) -> None:
    engine.use(llama, transfer(**{"tierloom.keys": keys}))
    tokens = prompt(1000, seed=201)
    tags: list[Any] = [
        None,
        {"tierloom.tags": {"tenant": "a"}},
        {"tierloom.tags": {"tenant": "b"}},
        {"tierloom.tags": {"tenant": "b", "project": "x"}},
    ]
    for kv in tags:
        expect(engine, tokens, cached=0, kv=kv)
        engine.settle()
    for kv in reversed(tags):
        expect(engine, tokens, cached=992, kv=kv)
    engine.settle()


@KEYS
def test_lora(engine: Engine, llama: Path, reference: Reference, tmp_path: Path, keys: str) -> None:
    """Two adapters and none; the same adapter under another name is the same (own keys)."""
    options = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    paths = {name: models.lora(tmp_path / name, llama, seed=i) for i, name in enumerate("ab")}
    adapters: dict[str, Any] = {
        name: {"lora_name": name, "lora_int_id": i + 1, "lora_path": str(path)}
        for i, (name, path) in enumerate(paths.items())
    }
    adapters["none"] = None
    tokens = prompt(1000, seed=202)
    right = {n: reference(tokens, lora=lora, options=options) for n, lora in adapters.items()}
    assert len({tuple(ids) for ids in right.values()}) == 3
    engine.use(llama, transfer(**{"tierloom.keys": keys}), **options)
    for cached in (0, 992):
        for name, lora in adapters.items():
            answer = engine.one(tokens, lora=lora)
            assert (name, answer.ids, answer.cached) == (name, right[name], cached)
            engine.settle()
    if keys == "own":
        renamed = {"lora_name": "c", "lora_int_id": 3, "lora_path": str(paths["a"])}
        answer = engine.one(tokens, lora=renamed)
        assert (answer.ids, answer.cached) == (right["a"], 992)


def test_other_adapter_under_the_same_name(
    engine: Engine, llama: Path, reference: Reference, tmp_path: Path
) -> None:
    """Its content names it: a retrained adapter in the same folder finds nothing."""
    options = {"enable_lora": True, "max_lora_rank": 8}
    kv = transfer("tiered", **{"tiers.warm.path": str(tmp_path / "kv")})
    tokens = prompt(1000, seed=203)
    found = []
    for seed in (5, 6):
        path = models.lora(tmp_path / "adapter", llama, seed=seed)
        lora = {"lora_name": "mine", "lora_int_id": 1, "lora_path": str(path)}
        options["seed"] = seed  # another reference
        right = reference(tokens, lora=lora, options=options)
        engine.use(llama, kv, **options)
        for cached in (0, 992):
            answer = engine.one(tokens, lora=lora)
            assert (answer.ids, answer.cached) == (right, cached)
            engine.settle()
        found.append(right)
        engine.stop()
        path.rename(tmp_path / f"adapter-{seed}")
    assert found[0] != found[1]
