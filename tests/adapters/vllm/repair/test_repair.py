"""Some tokens computed anew by a real engine's own model, and the proofs before it."""

from __future__ import annotations

import re
from pathlib import Path

import launch
import pytest

HERE = Path(__file__).parent


def run(script: str, names: str, folder: Path, **env: str) -> None:
    """All cases of a script that its list `names` has must hold."""
    path = HERE / script
    done = launch.finish(path, str(folder), names, timeout=900, **env)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert re.findall(r"^[a-z0-9]+_[a-z0-9_]+$", done.stdout, re.MULTILINE) == listed(path)[names]


def listed(path: Path) -> dict[str, list[str]]:
    found = re.findall(r"^([A-Z]+) = \[([a-z0-9_,\s]*)\]$", path.read_text(), re.MULTILINE)
    return {name: re.findall(r"\w+", cases) for name, cases in found}


def test_every_case_is_listed() -> None:
    for path in HERE.glob("*_cases.py"):
        cases = re.findall(r"^def (\w+)\(\) -> None:", path.read_text(), re.MULTILINE)
        assert cases
        assert sorted(cases) == sorted(case for names in listed(path).values() for case in names)


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("script", ["forward_cases.py", "proof_cases.py"])
def test_in_an_engine(script: str, tmp_path: Path) -> None:
    run(script, "CASES", tmp_path)


@pytest.mark.campaign
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("script", ["proof_cases.py", "rank_cases.py"])
def test_in_more_engines(script: str, tmp_path: Path) -> None:
    run(script, "CAMPAIGN", tmp_path)


@pytest.mark.campaign
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("script", ["proof_cases.py", "rank_cases.py"])
def test_in_a_compiled_engine(script: str, tmp_path: Path) -> None:
    run(script, "COMPILED", tmp_path, TORCH_COMPILE_DISABLE="0")
