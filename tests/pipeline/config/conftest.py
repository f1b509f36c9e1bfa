"""A place for YAML files, and the stand-in stages on the path."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent

import pytest

from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.config.problems import ConfigProblems, Problem


@pytest.fixture(autouse=True)
def _standins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    sys.modules.pop("standins", None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Checker:
    """Writes YAML into files of a folder and tells what is wrong with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, text: str, name: str = "p.yaml") -> str:
        (self.folder / name).write_text(dedent(text).lstrip("\n"))
        return f"./{name}"

    def problems(self, text: str, **overrides: object) -> tuple[Problem, ...]:
        """All problems; `a__b=1` overrides `a.b`."""
        dotted = {k.replace("__", "."): v for k, v in overrides.items()}
        with pytest.raises(ConfigProblems) as caught:
            load_config(self.write(text), dotted)
        return caught.value.problems


@pytest.fixture
def checker(folder: Path) -> Checker:
    return Checker(folder)
