"""Acceptance: a real model, 2,048 tokens of a real text, repeated and after a restart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import Engine, transfer
from launch import ROOT

from tierloom.adapters.demo import smollm2
from tierloom.stages.errors import ConfigError

if TYPE_CHECKING:
    from conftest import Reference

ROOM = {"budget.arena": "256 MiB", "tiers.hot.capacity": "512 MiB"}
DISK = {"tiers.warm.capacity": "1 GiB", "tiers.warm.segment": "256 MiB"}
OPTIONS = {"kv_cache_memory_bytes": 256 << 20}


@pytest.fixture(scope="module")
def model() -> Path:
    try:
        return smollm2.model_dir(progress=False)
    except ConfigError as missing:
        pytest.skip(str(missing))


def document(model: Path, length: int) -> list[int]:
    from transformers import AutoTokenizer

    text = (ROOT / "configs" / "demo.txt").read_text()
    ids: list[int] = AutoTokenizer.from_pretrained(model)(text * 2)["input_ids"]
    assert len(ids) >= length
    return ids[:length]


def test_repeat_and_restart(
    engine: Engine, model: Path, reference: Reference, tmp_path: Path
) -> None:
    tokens = document(model, 2048)
    right = reference(tokens, model=model, options=OPTIONS, max_tokens=24)
    kv = transfer("tiered", **{"tiers.warm.path": str(tmp_path / "kv")}, **ROOM, **DISK)
    engine.use(model, kv, **OPTIONS)
    cold = engine.one(tokens, max_tokens=24)
    assert (cold.ids, cold.cached) == (right, 0)
    engine.settle()
    again = engine.one(tokens, max_tokens=24)
    assert (again.ids, again.cached) == (right, 2016)
    engine.settle()
    after = engine.use(model, kv, fresh=True, **OPTIONS).one(tokens, max_tokens=24)
    assert (after.ids, after.cached) == (right, 2016)
    engine.settle()
