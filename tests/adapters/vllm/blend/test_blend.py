"""Prompts blended in a real engine."""

from __future__ import annotations

import re
from pathlib import Path

import launch
import pytest

SCRIPT = Path(__file__).with_name("blend_cases.py")


def listed() -> dict[str, list[str]]:
    found = re.findall(r"^([A-Z]+) = \[([a-z0-9_,\s]+)\]$", SCRIPT.read_text(), re.MULTILINE)
    return {name: re.findall(r"\w+", cases) for name, cases in found}


def test_every_case_is_listed() -> None:
    cases = re.findall(r"^def (\w+)\(\) -> None:", SCRIPT.read_text(), re.MULTILINE)
    assert cases
    assert sorted(cases) == sorted(case for names in listed().values() for case in names)


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("names", ["CASES", pytest.param("CAMPAIGN", marks=pytest.mark.campaign)])
def test_in_an_engine(names: str, tmp_path: Path) -> None:
    done = launch.finish(SCRIPT, str(tmp_path), names, timeout=900)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert re.findall(r"^[a-z0-9]+_[a-z0-9_]+$", done.stdout, re.MULTILINE) == listed()[names]
