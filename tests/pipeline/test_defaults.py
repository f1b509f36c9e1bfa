"""Default settings must not stop anyone: two pipelines at once, no home that can be written to."""

from __future__ import annotations

import logging
import re
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from conftest import Engine, tokens

import tierloom

if TYPE_CHECKING:
    from pathlib import Path

    from tierloom import Pipeline

SMALL = {
    "tiers.hot.capacity": "4 MiB", "tiers.warm.capacity": "32 MiB", "tiers.warm.segment": "4 MiB",
    "budget.arena": "8 MiB", "tiers.warm.keep_free": "0",
}  # fmt: skip


@pytest.fixture
def engine() -> Engine:
    return Engine()


def tiered(engine: Engine, model: str) -> Pipeline:
    return tierloom.open("tiered", layout=engine.layout, model=model, overrides=SMALL)


def test_two_at_once_and_each_finds_its_own_again(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TIERLOOM_DIR", raising=False)
    models = ("a", "b")
    with ExitStack() as both:
        for seed, pipe in enumerate([both.enter_context(tiered(engine, m)) for m in models]):
            got = pipe.store(tokens(300, seed), engine.caches, engine.slots(300)).wait(30)
            assert got.tokens == 300
    assert {f.name for f in (tmp_path / ".cache").iterdir()} == {"tierloom", "tierloom-2"}
    with ExitStack() as both:
        for model in reversed(models):
            pipe = both.enter_context(tiered(engine, model))
            kept = [pipe.lookup(tokens(300, seed)) for seed in range(2)]
            assert kept == ([300, 0] if model == "a" else [0, 300])


def test_no_folder_to_be_had(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes on in memory, and says so in one line."""
    monkeypatch.setenv("HOME", "/dev/null/home")
    monkeypatch.delenv("TIERLOOM_DIR", raising=False)
    caplog.set_level(logging.WARNING)
    with tiered(engine, "a") as pipe:
        for _ in range(2):
            got = pipe.store(tokens(300), engine.caches, engine.slots(300)).wait(30)
            assert (got.tokens, pipe.lookup(tokens(300))) == (300, 300)
    (line,) = [r.getMessage() for r in caplog.records]
    assert re.match(r"tier warm \(.*\) is down: ", line)
    assert "/dev/null/home/.cache/tierloom" in line
    assert "set TIERLOOM_DIR" in line


def test_a_folder_that_was_chosen_and_cannot_be_had_is_said(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIERLOOM_DIR", "/dev/null/kv")
    with pytest.raises(tierloom.ConfigError, match="/dev/null/kv: Not a directory"):
        tiered(engine, "a")
