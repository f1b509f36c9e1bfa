"""A calibration that transformers made of a model's folder is found by a vLLM that serves it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness import pipeline, prompt, transfer
from tiny import Letters

from tierloom.adapters.quality import calibrate
from tierloom.adapters.quality.subject import subject_of
from tierloom.stages.codecs.cachegen import calibration
from tierloom.stages.codecs.cachegen.coder import HEAD, CodedHead
from tierloom.stages.kv.object import Header

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Engine


def test_found_by_the_files(engine: Engine, llama: Path, tmp_path: Path) -> None:
    """With it and without: in both, K is turned back, whose frequencies the config names."""
    from transformers import AutoModelForCausalLM

    subject = subject_of("llama", AutoModelForCausalLM.from_pretrained(llama), Letters())
    home = tmp_path / "cache"
    (home / "tierloom" / "calibrations").mkdir(parents=True)
    path = home / "tierloom" / "calibrations" / "llama.safetensors"
    path.write_bytes(calibrate.learned(calibrate.observe(subject), subject))
    for name, calibrated in (("with", True), ("without", False)):
        if not calibrated:
            path.rename(tmp_path / "elsewhere")
        heads = kept_heads(engine, llama, tmp_path / name, home)
        right = calibration.read_calibration(path).id if calibrated else 0
        assert {h.calibration for h in heads} == {right}
        assert calibrated or {h.half for h in heads} == {16}


def kept_heads(engine: Engine, llama: Path, folder: Path, home: Path) -> list[CodedHead]:
    """What a new engine keeps of a prompt, and loads again."""
    source = pipeline(kept={"use": "files", "path": str(folder)})
    stages = source["graphs"]["store"]["stages"]
    put = stages.pop("to_kept")
    stages["small"] = {"use": "cachegen"}
    stages["to_kept"] = put
    tokens = prompt(600, seed=71)
    fresh = engine.use(llama, transfer(source), env={"XDG_CACHE_HOME": str(home)}, fresh=True)
    fresh.one(tokens)
    fresh.settle()
    assert fresh.one(tokens).cached >= 512
    heads = []
    for file in folder.rglob("*.tlm"):
        page = file.read_bytes()
        frames = Header.unpack(page[: Header.length(page)]).frames
        heads += [CodedHead(*HEAD.unpack_from(page, f.offset)) for f in frames if f.codecs]
    assert heads
    return heads
