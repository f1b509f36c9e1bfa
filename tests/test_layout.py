"""The shape of the repository, held by a test."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ["triton_kernels", "stages", "pipeline", "adapters"]
BANNED = {"utils", "util", "common", "helpers", "manager", "misc"}
MOVED = {"stages/base.py", "stages/tiers/base.py", "stages/tiers/blobs.py"}
"""Where contracts were in 0.1, for whoever still imports them from there; no rooms of ours."""
FILES = [
    p for floor in FLOORS for p in sorted((ROOT / floor).rglob("*.py"))
    if str(p.relative_to(ROOT)) not in MOVED
]  # fmt: skip


@pytest.mark.parametrize("name", [*FLOORS, "configs"])
def test_each_floor_is_linked_and_has_no_init(name: str) -> None:
    link = ROOT / "src" / "tierloom" / name
    assert link.is_symlink(), f"{link} must be a link: clone with core.symlinks, use unzip"
    assert link.resolve() == ROOT / name
    assert not (ROOT / name / "__init__.py").exists(), "it would shadow other people's package"
    assert importlib.util.find_spec(name) is None


def test_a_face_is_short() -> None:
    """`__init__.py` of a room names what outsiders import from it, and does nothing else."""
    faces = [p for p in FILES if p.name == "__init__.py"]
    assert not [p for p in faces if len(p.read_text().splitlines()) > 25]


def imported(path: Path) -> set[str]:
    """Our modules and packages that a file imports, wherever in it, as `stages.kv.object`."""
    names: set[str] = set()
    parts = ("tierloom", *path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = parts[: -node.level] if node.level else ()
            base = ".".join((*above, node.module or "")).strip(".")
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return {n.removeprefix("tierloom.") for n in names if n.startswith("tierloom.")}


def floors_imported(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def room_of(module: str) -> str | None:
    """The folder of a module of ours, as `stages/kv`; None: it is no module but a name in one."""
    path = ROOT / module.replace(".", "/")
    if path.with_suffix(".py").is_file():
        return str(path.parent.relative_to(ROOT))
    return str(path.relative_to(ROOT)) if (path / "__init__.py").is_file() else None


def rooms() -> dict[str, set[str]]:
    """Each folder that has modules, and those it imports from; for types alone counts as well."""
    found: dict[str, set[str]] = {}
    for path in FILES:
        here = str(path.parent.relative_to(ROOT))
        there = {room for name in imported(path) if (room := room_of(name))}
        found.setdefault(here, set()).update(there - {here})
    return found


def test_no_circle_of_folders() -> None:
    graph = rooms()
    while free := [room for room, below in graph.items() if not below & graph.keys()]:
        for room in free:
            del graph[room]
    assert not graph, {room: below & graph.keys() for room, below in graph.items()}


def levels() -> dict[str, int]:
    """Every folder's level, as docs/design.md lists them from the lowest on."""
    text = (ROOT / "docs" / "design.md").read_text()
    listed = text.split("<!-- levels -->")[1].split("<!-- end of levels -->")[0]
    lines = [line for line in listed.splitlines() if line.startswith("|") and "`" in line]
    return {room: i for i, line in enumerate(lines) for room in re.findall(r"`([a-z_/]+)/`", line)}


def test_imports_only_go_down_between_the_levels() -> None:
    level, graph = levels(), rooms()
    assert graph.keys() == level.keys(), "docs/design.md lists every folder"
    wrong = [(a, b) for a, below in graph.items() for b in below if level[b] >= level[a]]
    assert not wrong


def test_no_folder_is_crowded() -> None:
    count = Counter(path.parent for path in FILES if path.name != "__init__.py")
    assert not {str(folder): n for folder, n in count.items() if n > 14}
    tests = Counter(path.parent for path in (ROOT / "tests").rglob("*.py"))
    assert not {str(folder): n for folder, n in tests.items() if n > 20}


def test_a_full_room_has_a_readme_that_names_its_files() -> None:
    count = Counter(path.parent for path in FILES if path.name != "__init__.py")
    for folder in (f for f, n in count.items() if n > 5):
        text = (folder / "README.md").read_text()
        names = {p.name for p in FILES if p.parent == folder and not p.name.startswith("__")}
        assert not {n for n in names if f"`{n}`" not in text}, folder


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    ours = {p.stem for p in FILES} - {"__init__", "__main__"}
    assert not ours & sys.stdlib_module_names


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
        "stages/d.py": "import tierloom.pipeline.run.graph_runner",
        "stages/e.py": "def f():\n    from tierloom import pipeline",
    }.items():
        path = tmp_path / place
        path.write_text(line)
        assert "pipeline" in floors_imported(path), line
    inside = tmp_path / "stages/tiers/f.py"
    inside.write_text("from ..object import Header\nfrom .base import Tier")
    assert floors_imported(inside) == {"stages"}


def test_no_file_is_too_long() -> None:
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in FILES}
    assert not {name: n for name, n in lines.items() if n > 350}
    assert sum(n > 330 for n in lines.values()) <= 3, "a file at the limit is to be split"
    tests = {p.name: len(p.read_text().splitlines()) for p in (ROOT / "tests").rglob("*.py")}
    assert not {name: n for name, n in tests.items() if n > 500}


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
    "first",
    [
        "import tierloom",
        "import tierloom.adapters.cli.commands",
        "import tierloom.pipeline.config.load",
    ],
)
def test_import_is_light(first: str) -> None:
    code = f"import sys, json; {first}; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numba", "triton", "redis", "transformers"} & set(json.loads(run.stdout))
