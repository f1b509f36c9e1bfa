"""What is on disk is there for the next process, however the last one ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import models
from harness import Engine, prompt, transfer

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Expect, Reference


def test_restart(engine: Engine, llama: Path, expect: Expect, tmp_path: Path) -> None:
    kv = transfer("tiered", **{"tiers.warm.path": str(tmp_path / "kv")})
    layer = transfer(
        "tiered", **{"tiers.warm.path": str(tmp_path / "kv"), "tierloom.load": "layer"}
    )
    tokens = prompt(2048, seed=31)
    expect(engine.use(llama, kv), tokens, cached=0)
    engine.settle()
    for how, fresh in ((kv, True), (layer, False)):
        again = engine.use(llama, how, fresh=fresh)
        expect(again, tokens, cached=2016)
        expect(again, tokens + prompt(100, seed=32 + fresh), cached=2048)
        again.settle()


def test_killed(engine: Engine, llama: Path, expect: Expect, tmp_path: Path) -> None:
    """Once while it is idle, once in the middle of storing."""
    kv = transfer("tiered", **{"tiers.warm.path": str(tmp_path / "kv")})
    tokens, other = prompt(1500, seed=33), prompt(1500, seed=34)
    expect(engine.use(llama, kv), tokens, cached=0)
    engine.settle()
    engine.add(other)
    engine.ask("step")
    engine.kill()
    again = engine.use(llama, kv)
    expect(again, tokens, cached=1472)
    expect(again, other)  # what there is of it is whole
    again.settle()


def test_environment(engine: Engine, llama: Path, expect: Expect, tmp_path: Path) -> None:
    """`tierloom.config` may stand in the environment, with what the presets read from there."""
    env = {
        "TIERLOOM_CONFIG": "tiered",
        "TIERLOOM_DIR": str(tmp_path / "kv"),
        "TIERLOOM_MEMORY": "64 MiB",
        "TIERLOOM_DISK": "128 MiB",
    }
    kv = transfer("tiered")
    extra = kv["kv_connector_extra_config"]
    for key in ("tierloom.config", "tiers.hot.capacity", "tiers.warm.capacity"):
        del extra[key]
    expect(engine.use(llama, kv, env=env), prompt(600, seed=35), cached=0)
    engine.settle()
    assert (tmp_path / "kv").is_dir()
    expect(engine.use(llama, kv, env=env, fresh=True), prompt(600, seed=35), cached=576)


def test_other_weights_find_nothing(
    engine: Engine, llama: Path, expect: Expect, reference: Reference, tmp_path: Path
) -> None:
    """Same config, same folder, other weights: another model."""
    kv = transfer("tiered", **{"tiers.warm.path": str(tmp_path / "kv")})
    tokens = prompt(1000, seed=36)
    expect(engine.use(llama, kv), tokens, cached=0)
    engine.settle()
    twin = models.llama(tmp_path / "twin", seed=1)
    right = reference(tokens, model=twin)
    assert right != reference(tokens)
    answer = engine.use(twin, kv).one(tokens)
    assert answer.cached == 0
    assert answer.ids == right
    engine.settle()
    expect(engine.use(llama, kv), tokens, cached=992)
