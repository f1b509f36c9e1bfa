"""Two connectors under vLLM's MultiConnector: both store, the first that has something loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness import Engine, prompt, transfer

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Expect


def both(*children: dict[str, Any]) -> dict[str, Any]:
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": list(children)},
    }


def test_two_children(engine: Engine, llama: Path, expect: Expect, tmp_path: Path) -> None:
    one, other = (
        transfer("tiered", **{"tiers.warm.path": str(tmp_path / name)}) for name in ("one", "other")
    )
    engine.use(llama, both(one, other))
    tokens = prompt(1000, seed=420)
    expect(engine, tokens, cached=0)
    engine.settle()
    expect(engine, tokens, cached=992)
    expect(engine, tokens + prompt(200, seed=421), cached=992)
    engine.settle()
    for kv in (one, other):  # each has all of it
        engine.use(llama, kv)
        expect(engine, tokens, cached=992)
        engine.settle()


def test_the_second_serves_what_the_first_lacks(
    engine: Engine, llama: Path, expect: Expect, tmp_path: Path
) -> None:
    full = transfer("tiered", **{"tiers.warm.path": str(tmp_path / "full")})
    tokens = prompt(1000, seed=422)
    expect(engine.use(llama, full), tokens, cached=0)
    engine.settle()
    empty = transfer("tiered", **{"tiers.warm.path": str(tmp_path / "empty")})
    engine.use(llama, both(empty, full))
    expect(engine, tokens, cached=992)
    engine.settle()
