"""What the documentation shows is what runs."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from tierloom.pipeline.config import load as check
from tierloom.pipeline.config.coerce import fill, names_of
from tierloom.pipeline.config.problems import Findings, Place
from tierloom.pipeline.config.spec import Breaker, Wire
from tierloom.pipeline.config.yaml_tree import from_python
from tierloom.stages import catalog
from tierloom.stages.options import field_docs

ROOT = Path(__file__).resolve().parent.parent
NAMES = [("stage", n) for n in catalog.STAGES] + [("tier", n) for n in catalog.TIERS]
LINE = re.compile(r"^ *([A-Za-z_][\w-]*): +(\{use: .*\})$", re.MULTILINE)
SHARED = {"stage": names_of(Wire) | {"use", "from"}, "tier": names_of(Breaker) | {"use"}}


@pytest.fixture(params=NAMES, ids=[n for _, n in NAMES])
def component(request):
    kind, name = request.param
    return kind, name, catalog.load_class(kind, name)


def test_the_yaml_in_a_docstring_is_right(component) -> None:
    kind, _, cls = component
    lines = [m[2] for m in LINE.finditer(import_module(cls.__module__).__doc__ or "")]
    assert lines, f"{cls.__module__} shows no line of YAML"
    for line in lines:
        entry = from_python(yaml.safe_load(line), Place(line), "", found := Findings())
        shown = catalog.load_class(kind, entry.items["use"].value)
        assert shown.__module__ == cls.__module__
        fill(shown.Options, entry, "", found, also=SHARED[kind])
        assert not found.sorted()


def test_every_option_has_a_doc_line(component) -> None:
    _, _, cls = component
    docs = field_docs(cls.Options)
    assert set(names_of(cls.Options)) <= set(docs)
    assert all(d.rstrip().endswith(".") for d in docs.values()), docs


def test_names_in_the_code_are_names_in_yaml(component) -> None:
    _, name, cls = component
    assert name.replace("_", "") == cls.__name__.lower()


@pytest.mark.parametrize("readme", [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))])
def test_yaml_blocks_of_a_readme_load(readme: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(check, "memory_here", lambda: 1 << 40)
    for i, block in enumerate(re.findall(r"```yaml\n(.*?)```", readme.read_text(), re.DOTALL)):
        file = tmp_path / f"{i}.yaml"
        file.write_text(block)
        if "version:" in block:
            check.load_config(file)
        else:
            yaml.safe_load(block)


def test_the_readme_serves_an_engine_of_ones_own(tmp_path, monkeypatch) -> None:
    import numpy as np
    import torch

    monkeypatch.setenv("TIERLOOM_DIR", str(tmp_path))
    monkeypatch.setenv("TIERLOOM_MEMORY", "64 MiB")
    monkeypatch.setenv("TIERLOOM_DISK", "64 MiB")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = [b for b in blocks if "KVLayout" in b]
    names = {
        "caches": [torch.randn(2, 40, 16, 2, 8) for _ in range(6)],
        "tokens": np.arange(600, dtype=np.int32),
        "slots": np.arange(600),
    }
    exec(code, names)
    assert (names["n"], names["usable"]) in ((0, 0), (0, 600))
    exec(code, names)
    assert names["receipt"].tokens in (0, 600)


LINK = re.compile(r"\[`([\w.]+)`\]\(([\w/.]+\.py)\)")


def defined_in(path: Path) -> set[str]:
    """Classes, functions and methods of a file, as `Class.method`."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            methods = (
                n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
            )
            names |= {node.name} | {f"{node.name}.{method.name}" for method in methods}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
    return names


def test_every_step_of_the_walkthrough_is_a_function_that_exists() -> None:
    text = (ROOT / "docs" / "walkthrough.md").read_text()
    links = LINK.findall(text)
    assert len(links) > 30
    wrong = [(n, p) for n, p in links if n not in defined_in((ROOT / "docs" / p).resolve())]
    assert not wrong
    for part in text.split("\n## ")[2:]:
        steps = re.findall(r"^(\d+)\. (.*)$", part, re.MULTILINE)
        assert [int(n) for n, _ in steps] == list(range(1, len(steps) + 1))
        assert len(steps) <= 14
        assert all(LINK.search(step) for _, step in steps)
