"""One name for one thing: no class, public function or module of ours has a second meaning."""

from __future__ import annotations

import ast
from collections import defaultdict

from .test_layout import FILES, ROOT

TWICE = {
    "Manifest": "what says which parts an object has, of Redis and of pools: two formats",
    "Graph": "of a file, as it is checked and as it is written in Python: one thing",
    "explain": "a command, and what it prints",
    "schema": "a command",
    "main": "the command line's face, and what it runs",
    "Settings": "options of an engine's adapter",
    "describe": "what the registry calls of a codec, and the codecs' own",
}
"""Names that are defined more than once, and why that is no second meaning."""

MODULES = {
    "reference": "of a kernel, in its room", "cpu": "of a kernel", "triton": "of a kernel",
    "tier": "the tier of its room", "stage": "the contract; the codec's stage in cachegen",
    "side": "the scheduler's and the worker's", "options": "of stages; of a config of LMCache",
    "manifest": "of Redis, of pools", "connection": "to Redis, to a server of ours",
    "layout": "of a cache; how vLLM's is described by one", "tables": "of pointers; of rANS",
    "request": "of a graph; as vLLM's scheduler follows it",
    "settings": "of an engine's adapter",
}  # fmt: skip
"""Modules that are read with the name of their room."""


def test_no_class_or_function_has_a_second_meaning() -> None:
    where: dict[str, set[str]] = defaultdict(set)
    for path in FILES:
        kernel = path.is_relative_to(ROOT / "triton_kernels")  # three forms of one op share a name
        for node in ast.parse(path.read_text()).body:
            public = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not kernel
            if isinstance(node, ast.ClassDef) or (public and not node.name.startswith("_")):
                where[node.name.lstrip("_")].add(str(path.relative_to(ROOT)))
    twice = {name: sorted(files) for name, files in where.items() if len(files) > 1}
    assert not {name: files for name, files in twice.items() if name not in TWICE}
    assert not TWICE.keys() - twice.keys(), "explained, but no longer there"


def test_no_module_has_a_second_meaning() -> None:
    where: dict[str, set[str]] = defaultdict(set)
    for path in FILES:
        where[path.stem].add(str(path.parent.relative_to(ROOT)))
    twice = {name for name, rooms in where.items() if len(rooms) > 1} - {"__init__"}
    assert not twice - MODULES.keys()
