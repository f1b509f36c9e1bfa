"""A YAML file, or a mapping, as a tree in which every value knows where it was written.

PyYAML only composes. The types of scalars are ours (YAML 1.2: `no` is a word, `010` is ten), as are
the variables `${VAR}` and `${VAR:-default}` and the refusal of tags and double keys; so each
finding has its place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from tierloom.pipeline.config.problems import Findings, Place
from tierloom.stages.options import masked

Scalar: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Leaf:
    """A scalar."""

    value: Scalar
    at: Place
    text: str | None = None
    """How it was written, where an environment variable made it: then `5` may also be text."""


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence."""

    items: tuple[Tree, ...]
    at: Place


@dataclass(frozen=True, slots=True)
class Table:
    """A mapping."""

    items: dict[str, Tree]
    keys: dict[str, Place]
    """Position of each key."""
    at: Place
    """Position of its own key, or of its first token."""

    def part(self, names: Set[str]) -> Table:
        """Only the named items."""
        return Table({k: v for k, v in self.items.items() if k in names}, self.keys, self.at)

    def without(self, names: Set[str]) -> Table:
        return self.part(set(self.items) - names)


Tree: TypeAlias = Leaf | Row | Table


def dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def parse(file: Path, found: Findings, asked: Place | None = None) -> Tree | None:
    """The tree of a file; None if there is none. `asked`: where the file was named, if anywhere."""
    at = asked or Place(str(file))
    try:
        text = file.read_bytes().decode()
    except (OSError, ValueError) as e:
        reason = (e.strerror if isinstance(e, OSError) else None) or str(e)
        found.add(at, "", f"cannot read {file}: {reason}")
        return None
    lines = text.splitlines()

    def place(mark: Any) -> Place:
        line = lines[mark.line] if mark.line < len(lines) else ""
        return Place(str(file), mark.line + 1, mark.column + 1, line)

    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        if node is not None:
            return _Builder(place, found).build(node, "")
        found.add(Place(str(file), 1, 1), "", "is empty", "begin with 'version: 1'")
    except yaml.MarkedYAMLError as e:
        at = place(e.problem_mark) if e.problem_mark else Place(str(file))
        found.add(at, "", f"not YAML: {e.problem or e}", e.context or "")
    except (yaml.YAMLError, RecursionError) as e:
        found.add(Place(str(file)), "", f"not YAML: {str(e).splitlines()[0]}")
    return None


class _Builder:
    """YAML nodes to trees. An anchor's node is built once, so aliases cannot blow up."""

    def __init__(self, place: Callable[[Any], Place], found: Findings) -> None:
        self._place, self._found = place, found
        self._built: dict[int, Tree | None] = {}

    def build(self, node: yaml.Node, path: str, key: Place | None = None) -> Tree:
        at = self._place(node.start_mark)
        if id(node) in self._built:
            known = self._built[id(node)]
            if known is None:
                self._found.add(at, path, "an anchor contains itself")
            return known or Leaf(None, at)
        self._built[id(node)] = None
        if node.tag.removeprefix("tag:yaml.org,2002:") not in {"str", "seq", "map"}:
            self._found.add(at, path, f"tag {node.tag!r} is not allowed", "write plain values")
        tree: Tree
        if isinstance(node, yaml.MappingNode):
            tree = self._table(node, key or at, path)
        elif isinstance(node, yaml.SequenceNode):
            tree = Row(tuple(self.build(n, f"{path}[{i}]") for i, n in enumerate(node.value)), at)
        else:
            assert isinstance(node, yaml.ScalarNode)
            tree = _leaf(node.value, at, path, self._found, quoted=node.style is not None)
        self._built[id(node)] = tree
        return tree

    def _table(self, node: yaml.MappingNode, at: Place, path: str) -> Table:
        table = Table({}, {}, at)
        for key, value in node.value:
            where = self._place(key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                self._found.add(where, path, "a key must be a word")
                continue
            name = str(key.value)
            if name in table.keys:
                first = table.keys[name].line
                self._found.add(where, path, f"key {name!r} occurs twice, first in line {first}")
                continue
            table.keys[name] = where
            table.items[name] = self.build(value, dotted(path, name), where)
        return table


_INT = re.compile(r"[-+]?[0-9]{1,40}")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]{1,3})?")
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None, "~": None, "": None}
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\}")


def _typed(text: str) -> Scalar:
    """A plain scalar's value, as YAML 1.2 has it: decimal numbers, true, false, null, text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _leaf(text: str, at: Place, path: str, found: Findings, *, quoted: bool) -> Leaf:
    """A scalar with its variables put in; one with variables is typed whether quoted or not."""
    if "${" not in text:
        return Leaf(text if quoted else _typed(text), at)

    def value(m: re.Match[str]) -> str:
        name, default = m.groups()
        if given := os.environ.get(name) or default:
            return given
        if default is None and name not in os.environ:
            hint = f"set it, or give a default: ${{{name}:-value}}"
            found.add(at, path, f"environment variable {name} is not set", hint)
        return ""

    if "${" in _VARIABLE.sub("", text):
        hint = "write ${NAME} or ${NAME:-default}"
        found.add(at, path, f"{text!r} has a variable that is not closed or not a name", hint)
        return Leaf(text, at)
    text = _VARIABLE.sub(value, text)
    return Leaf(_typed(text), at, text)


def from_python(value: Any, at: Place, path: str, found: Findings) -> Tree:
    """A tree from what a YAML file would hold. Whatever else it holds is a problem."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return _leaf(value, at, path, found, quoted=True)
    if value is None or isinstance(value, (int, float)):
        return Leaf(value, at)
    if path.count(".") + path.count("[") > 50:
        found.add(at, path, "is nested too deeply")
    elif isinstance(value, Mapping):
        items = {str(k): from_python(v, at, dotted(path, str(k)), found) for k, v in value.items()}
        return Table(items, dict.fromkeys(items, at), at)
    elif isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        rows = (from_python(v, at, f"{path}[{i}]", found) for i, v in enumerate(value))
        return Row(tuple(rows), at)
    else:
        found.add(at, path, f"{type(value).__name__} is nothing that YAML can say")
    return Leaf(None, at)


def shown(tree: Tree) -> str:
    """A value for a message, short."""
    if isinstance(tree, Leaf):
        if tree.value is None or isinstance(tree.value, bool):
            return {None: "nothing", True: "true", False: "false"}[tree.value]
        text = masked(repr(tree.value))  # before it is cut: what follows a secret gives it away
        return text if len(text) < 60 else f"{text[:56]}..."
    return "a list" if isinstance(tree, Row) else "a mapping"
