"""Prompts blended in a real engine."""

from __future__ import annotations

import re
from pathlib import Path

import launch
import pytest

HERE = Path(__file__).parent
SCRIPTS = sorted(path.name for path in HERE.glob("*_cases.py"))


def listed(script: str) -> dict[str, list[str]]:
    text = (HERE / script).read_text()
    found = re.findall(r"^([A-Z]+) = \[([a-z0-9_,\s]+)\]$", text, re.MULTILINE)
    return {name: re.findall(r"\w+", cases) for name, cases in found}


def run(script: str, names: str, folder: Path, **env: str) -> None:
    """All cases of a script that its list `names` has must hold."""
    done = launch.finish(HERE / script, str(folder), names, timeout=900, **env)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    held = re.findall(r"^[a-z0-9]+_[a-z0-9_]+$", done.stdout, re.MULTILINE)
    assert held == listed(script)[names]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_case_is_listed(script: str) -> None:
    cases = re.findall(r"^def (\w+)\(\) -> None:", (HERE / script).read_text(), re.MULTILINE)
    assert cases
    assert sorted(cases) == sorted(case for names in listed(script).values() for case in names)


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("script", [s for s in SCRIPTS if "CASES" in listed(s)])
def test_in_an_engine(script: str, tmp_path: Path) -> None:
    run(script, "CASES", tmp_path)


@pytest.mark.campaign
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("script", [s for s in SCRIPTS if "CAMPAIGN" in listed(s)])
def test_at_length(script: str, tmp_path: Path) -> None:
    run(script, "CAMPAIGN", tmp_path)


@pytest.mark.campaign
@pytest.mark.timeout(1000)
def test_in_a_compiled_engine(tmp_path: Path) -> None:
    run("rank_cases.py", "COMPILED", tmp_path, TORCH_COMPILE_DISABLE="0")
