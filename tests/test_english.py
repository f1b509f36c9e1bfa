"""What users read is plain English: none of the phrases that only a native speaker reads once."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import typer.main

from tierloom.adapters.cli.commands import app
from tierloom.stages import catalog
from tierloom.stages.options import field_docs

ROOT = Path(__file__).resolve().parent.parent
FILES = [
    path
    for folder in ("triton_kernels", "stages", "pipeline", "adapters", "src/tierloom/testing")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
HARD = re.compile(
    r"(?<!here )\bis no (?!longer|room|use)\w+\b|\bthat (is|are) none\b|(?<!here )\bis none\b"
    r"|\bbehind\b|\bstands\b|\bof late\b|\bfor want of\b|\bso (many|much) (?!that)"
    r"|^None: |^None\.$|^Little: |\bfor ever\b"
    r"|\bgoes home\b|\bhome by\b|\blet go\b|\bgiven up\b|\bgives? up\b|\btold apart\b|\bin vain\b"
    r"|\bspoilt\b|\blonger than nothing\b|\bnobody is there\b|\bwill not have us\b"
)


def strings_of(path: Path) -> list[tuple[int, str]]:
    """Every string of a file but docstrings, with its line: errors, logs, help."""
    tree = ast.parse(path.read_text())
    docs = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [
        *((n.lineno, n.value) for n in ast.walk(tree)
          if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs),
        *((n.lineno, filled(n)) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr)),
    ]  # fmt: skip


def filled(text: ast.JoinedStr) -> str:
    """An f-string as it is read, with a word in place of each value."""
    parts = (p.value if isinstance(p, ast.Constant) else "thing" for p in text.values)
    return "".join(map(str, parts))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_messages(path: Path) -> None:
    hard = [(line, text) for line, text in strings_of(path) if HARD.search(text)]
    assert not hard


OPTIONS = [("stage", name) for name in catalog.STAGES] + [("tier", name) for name in catalog.TIERS]


@pytest.mark.parametrize(("kind", "name"), OPTIONS, ids=[n for _, n in OPTIONS])
def test_option_docs(kind: catalog.Kind, name: str) -> None:
    options = catalog.load_class(kind, name).Options
    docs = field_docs(options) | {"": options.__doc__ or ""}
    assert not {name: doc for name, doc in docs.items() if HARD.search(doc)}


def test_help() -> None:
    group = typer.main.get_command(app)
    for name, command in {"": group, **group.commands}.items():  # type: ignore[attr-defined]
        texts = [command.help or "", *(getattr(p, "help", "") or "" for p in command.params)]
        assert not [text for text in texts if HARD.search(text)], name


def test_a_phrase_that_ends_in_a_value_is_seen(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text('f"{name!r} is no {kind}"')
    assert [text for _, text in strings_of(tmp_path / "x.py") if HARD.search(text)]


@pytest.mark.parametrize("text", ["x is no id", "waits behind it", "None: there is one way"])
def test_the_phrases_are_seen(text: str) -> None:
    assert HARD.search(text)
