"""Tiers that are damaged, full, stuck, or gone and back: never a wrong token, at most a miss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from harness import Engine, disk, pipeline, prompt, transfer

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Expect, Reference

LOADS = pytest.mark.parametrize("load", ["async", "layer"])
MEMORY = {"use": "memory", "capacity": "64 MiB"}

FAULTS: dict[str, dict[str, Any]] = {
    "slower than the deadline": {"use": "slow", "delay": "3 s"},
    "flaky": {"use": "flaky", "rate": 0.4, "seed": 3},
    "always failing": {"use": "flaky", "rate": 1.0},
    "lying": {"use": "flaky", "rate": 0.5, "seed": 3, "corrupt": True},
    "always lying": {"use": "flaky", "rate": 1.0, "corrupt": True},
    "stuck opening": {"use": "stuck", "at": "open"},
    "stuck asking": {"use": "stuck", "at": "has"},
    "stuck putting": {"use": "stuck", "at": "put"},
    "stuck reading": {"use": "stuck", "at": "read"},
    "stuck at the first byte": {"use": "stuck", "at": "first_byte"},
    "full": {"use": "full"},
}


@LOADS
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_tier(
    engine: Engine, llama: Path, reference: Reference, fault: str, load: str
) -> None:
    """The only one there is. Three prompts one by one and then at once, twice over."""
    tier = FAULTS[fault] | {"capacity": "64 MiB", "timeout": "400 ms", "probe": "200 ms"}
    config = pipeline(warm=tier)
    config["graphs"]["store"]["deadline"] = config["graphs"]["retrieve"]["deadline"] = "600 ms"
    kv = {"tierloom.load": load, "tierloom.wait": "250 ms", "tierloom.hold": "500 ms"}
    engine.use(llama, transfer(config, **kv))
    prompts = [prompt(500 + 100 * i, seed=120 + i) for i in range(3)]
    right = [reference(tokens) for tokens in prompts]
    for _ in range(2):
        assert [engine.one(tokens).ids for tokens in prompts] == right
        assert [a.ids for a in engine.generate(*prompts)] == right
        engine.settle()


@LOADS
def test_the_good_tier_goes_on(engine: Engine, llama: Path, expect: Expect, load: str) -> None:
    """A memory tier beside a stuck one: everything is found."""
    stuck = {"use": "stuck", "at": "put", "capacity": "64 MiB", "timeout": "300 ms"}
    config = pipeline(hot=MEMORY, warm=stuck)
    config["graphs"]["store"]["stages"]["to_warm"]["when_full"] = "drop"
    engine.use(llama, transfer(config, **{"tierloom.load": load}))
    for i in range(4):
        expect(engine, prompt(800, seed=130 + i), cached=0)
    engine.settle()
    for i in range(4):
        expect(engine, prompt(800, seed=130 + i), cached=768)
    engine.settle()


@LOADS
def test_damaged_on_disk(
    engine: Engine, llama: Path, expect: Expect, tmp_path: Path, load: str
) -> None:
    """Found out when it is read, dropped, computed and stored again: the next one hits."""
    kv = transfer(pipeline(warm=disk(tmp_path / "kv")), **{"tierloom.load": load})
    tokens = prompt(1000, seed=140)
    expect(engine.use(llama, kv), tokens, cached=0)
    engine.settle()
    expect(engine, tokens, cached=992)
    engine.stop()
    assert damage(tmp_path / "kv") > 0
    expect(engine.use(llama, kv), tokens)
    engine.settle()
    expect(engine, tokens)
    engine.settle()
    expect(engine, tokens, cached=992)
    engine.settle()


@LOADS
@pytest.mark.parametrize("save", ["step", "layer"])
def test_what_was_computed_on_top_of_damage_is_not_kept(
    engine: Engine, llama: Path, expect: Expect, tmp_path: Path, load: str, save: str
) -> None:
    """A load that fails within a step spoils all that this step computes behind it.

    vLLM computes it again, and the ids are right; but were it stored in the meantime, it would be
    whole, verified and wrong for ever after.
    """
    kv = {"tierloom.load": load, "tierloom.save": save, "tierloom.save_decode": True}
    kv = transfer(pipeline(warm=disk(tmp_path / "kv")), **kv)
    tokens = prompt(1000, seed=170)
    longer = tokens + prompt(500, seed=171)
    expect(engine.use(llama, kv, max_num_batched_tokens=256), tokens, cached=0)
    engine.settle()
    engine.stop()
    assert damage(tmp_path / "kv") > 0
    engine.use(llama, kv, max_num_batched_tokens=256)
    for _ in range(4):
        expect(engine, longer, max_tokens=40)
        engine.settle()
    expect(engine, longer, cached=1472)


def test_damaged_while_others_decode(
    engine: Engine, llama: Path, reference: Reference, tmp_path: Path
) -> None:
    kv = transfer(pipeline(warm=disk(tmp_path / "kv")))
    tokens, other = prompt(1000, seed=141), prompt(700, seed=142)
    engine.use(llama, kv).generate(tokens)
    engine.settle()
    engine.stop()
    assert damage(tmp_path / "kv") > 0
    engine.use(llama, kv)
    decoding = engine.add(other, max_tokens=60)
    engine.ask("step", times=5)
    loading = engine.add(tokens, max_tokens=20)
    first, second = engine.finish(decoding, loading)
    assert first.ids == reference(other, max_tokens=60)
    assert second.ids == reference(tokens, max_tokens=20)
    engine.settle()


def damage(folder: Path) -> int:
    """Turn one byte in each 16 KiB of the segment files; how many that were."""
    turned = 0
    for file in folder.rglob("*"):
        if not file.is_file() or file.stat().st_size < 1 << 20:
            continue
        with file.open("r+b") as f:
            for at in range(12345 % 16384, file.stat().st_size, 16384):
                f.seek(at)
                if byte := f.read(1)[0]:  # what is zero was never written
                    f.seek(at)
                    f.write(bytes([byte ^ 0x10]))
                    turned += 1
    return turned


@LOADS
def test_disk_full(engine: Engine, llama: Path, expect: Expect, tmp_path: Path, load: str) -> None:
    """Room for two prompts of eight; and then a folder whose file system has none at all."""
    small = disk(tmp_path / "small") | {"capacity": "4 MiB", "segment": "1 MiB"}
    none = disk(tmp_path / "none") | {"keep_free": "1000 TiB"}
    for tier in (small, none):
        engine.use(llama, transfer(pipeline(warm=tier), **{"tierloom.load": load}))
        for _ in range(2):
            for i in range(8):
                expect(engine, prompt(800, seed=150 + i))
            engine.settle()


def test_killed_and_back(engine: Engine, llama: Path, expect: Expect, tmp_path: Path) -> None:
    """The folder of a `files` tier goes away under a running engine, and comes back."""
    folder = tmp_path / "shared"
    files = {"use": "files", "path": str(folder), "timeout": "5 s", "probe": "100 ms"}
    engine.use(llama, transfer(pipeline(cold=files)))
    tokens = prompt(1025, seed=160)
    expect(engine, tokens, cached=0)
    engine.settle()
    expect(engine, tokens, cached=1024)
    folder.rename(tmp_path / "away")
    folder.write_text("not a folder")
    for i in range(6):
        expect(engine, tokens)
        expect(engine, prompt(600, seed=161 + i))
    engine.settle()
    folder.unlink()
    (tmp_path / "away").rename(folder)
    for _ in range(40):  # until a probe has found that it is back
        if expect(engine, tokens).cached == 1024:
            break
        engine.settle()
    else:
        pytest.fail("the tier is back and is not used")
    engine.settle()
