"""The shape of the repository, held by a test."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ["triton_kernels", "stages", "pipeline", "adapters"]
BANNED = {"utils", "util", "common", "helpers", "manager", "misc"}
FILES = [p for floor in FLOORS for p in sorted((ROOT / floor).rglob("*.py"))]


@pytest.mark.parametrize("name", [*FLOORS, "configs"])
def test_each_folder_is_linked_and_has_no_init(name: str) -> None:
    link = ROOT / "src" / "tierloom" / name
    assert link.is_symlink(), f"{link} must be a link: clone with core.symlinks, use unzip"
    assert link.resolve() == ROOT / name
    assert not list((ROOT / name).rglob("__init__.py")), "it would shadow other people's package"
    assert importlib.util.find_spec(name) is None


def floors_imported(path: Path) -> set[str]:
    """The floors that a file imports, wherever in it."""
    names: set[str] = set()
    parts = ("tierloom", *path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = parts[: -node.level] if node.level else ()
            base = ".".join((*above, node.module or "")).strip(".")
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return {n.split(".")[1] for n in names if n.startswith("tierloom.")}


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_only_go_down(floor: str) -> None:
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    for path in (ROOT / floor).rglob("*.py"):
        assert not floors_imported(path) & above, f"{path.name} imports a floor above its own"


def test_upward_imports_of_every_form_are_seen(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "stages" / "tiers").mkdir(parents=True)
    for place, line in {
        "stages/a.py": "from ..pipeline import flow",
        "stages/b.py": "from .. import pipeline",
        "stages/tiers/c.py": "from ...pipeline.flow import Flow",
        "stages/d.py": "import tierloom.pipeline.flow",
        "stages/e.py": "def f():\n    from tierloom import pipeline",
    }.items():
        path = tmp_path / place
        path.write_text(line)
        assert "pipeline" in floors_imported(path), line
    inside = tmp_path / "stages/tiers/f.py"
    inside.write_text("from ..object import Header\nfrom .base import Tier")
    assert floors_imported(inside) == {"stages"}


def test_no_file_is_too_long() -> None:
    assert not [p.name for p in FILES if len(p.read_text().splitlines()) > 350]


def test_files_and_classes_are_named_for_what_they_do() -> None:
    assert not [p.name for p in FILES if p.stem in BANNED]
    for path in FILES:
        nodes = ast.walk(ast.parse(path.read_text()))
        names = [n.name for n in nodes if isinstance(n, ast.ClassDef)]
        assert not [n for n in names if n.endswith(("Manager", "Handler", "Impl"))], path.name


def test_no_engine_is_imported_below_the_adapters() -> None:
    engines = {"vllm", "sglang", "transformers"}
    for path in FILES:
        if path.is_relative_to(ROOT / "adapters"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not {n.split(".")[0] for n in names} & engines, path.name


def test_nothing_unpickles() -> None:
    assert not [p.name for p in FILES if "pickle" in p.read_text().replace("unpickled", "")]


@pytest.mark.parametrize(
    "first", ["import tierloom", "import tierloom.adapters.cli", "import tierloom.pipeline.check"]
)
def test_import_is_light(first: str) -> None:
    code = f"import sys, json; {first}; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numba", "triton", "redis", "transformers"} & set(json.loads(run.stdout))
