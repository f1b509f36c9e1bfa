"""An object is dropped on proof of damage alone: the code is read for another way."""

from __future__ import annotations

import ast
from pathlib import Path

STAGES = Path(__file__).parents[1] / "stages"
FILES = sorted(STAGES.rglob("*.py"))
DROPS = {"drop", "expel", "unlink", "remove", "delete"}
"""What takes an object away, with an underscore before it or without, and what begins so."""
PLAIN = {"read", "load", "plan", "apply", "judge", "checked", "known", "begin", "settled", "took"}
"""What reads. (An index's `load` removes its own snapshots that were half written.)"""


def called(node: ast.AST) -> set[str]:
    """Names of all functions and methods that are called inside."""
    functions = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
    names = [getattr(f, "attr", getattr(f, "id", "")) for f in functions]
    return {name.lstrip("_") for name in names}


def test_who_found_something_bad_drops_it_on_proof_only() -> None:
    """Where any BadObject is caught, what drops is `expel`, and takes the one that is Damaged."""
    found = 0
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ExceptHandler) or node.type is None:
                continue
            caught = ast.unparse(node.type)
            if "BadObject" in caught or "Unreadable" in caught:
                found += 1
                assert not called(node) & (DROPS - {"expel"}), (path, node.lineno)
    assert found >= 7, "this test reads nothing"


def test_what_drops_for_damage_takes_the_proof() -> None:
    """mypy then sees to it that nobody calls it without; it is all that reading calls."""
    found = 0
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            name = node.name.lstrip("_")
            if name == "expel":
                found += 1
                types = [ast.unparse(a.annotation) for a in node.args.args if a.annotation]
                assert any("Damaged" in t for t in types), (path, node.lineno)
            elif name in PLAIN and path.name != "index_log.py":
                assert not called(node) & (DROPS - {"expel"}), (path, node.lineno)
    assert found >= 7, "this test reads nothing"


def test_codecs_have_no_proof() -> None:
    """Whether bytes are as they were written, checksums say, which are outside of every codec."""
    for path in (STAGES / "codecs").glob("*.py"):
        names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        assert "Damaged" not in names, path
