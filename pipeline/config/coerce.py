"""A tree's values as Python values, checked against the types of an options dataclass."""

from __future__ import annotations

import math
import types
from collections.abc import Set
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints  # fmt: skip

from tierloom.pipeline.config.problems import Findings, nearest
from tierloom.pipeline.config.resolve import class_of
from tierloom.pipeline.config.tier_urls import WRITTEN, expand_tier
from tierloom.pipeline.config.yaml_tree import Leaf, Row, Table, Tree, dotted, shown
from tierloom.stages.options import field_docs
from tierloom.stages.tiers.contract.tier import Inner

BAD: Any = object()
"""What `convert` gives for a value that cannot be used; its problem has been noted."""


def fill(
    cls: Any, table: Table, path: str, found: Findings, also: Set[str] = frozenset()
) -> Any | None:
    """An object of options class `cls`; None where there is a problem, which has been noted.

    `also` are keys that may stand in the mapping but are somebody else's.
    """
    kinds = get_type_hints(cls, include_extras=True)
    known = {f.name: f for f in fields(cls) if f.name not in also}
    before = len(found)
    values: dict[str, Any] = {}
    for key, tree in table.items.items():
        if key in known:
            values[key] = coerce(kinds[key], tree, dotted(path, key), found)
        elif key not in also:
            found.add(table.keys[key], path, f"unknown key {key!r}", nearest(key, {*known, *also}))
    for name, field in known.items():
        if field.default is MISSING and field.default_factory is MISSING and name not in values:
            doc = field_docs(cls).get(name, "")
            found.add(table.at, path, f"option {name!r} is missing", doc)
    if len(found) > before:
        return None
    try:
        return cls(**values)
    except ValueError as e:
        found.add(table.at, path, str(e))
        return None


def names_of(cls: Any) -> frozenset[str]:
    """The options that a class has."""
    return frozenset(f.name for f in fields(cls))


def coerce(kind: Any, tree: Tree, path: str, found: Findings) -> Any:
    """The value as type `kind`, or BAD."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        parse = next((a for a in args[1:] if callable(a)), None)
        if parse is None:
            return coerce(args[0], tree, path, found)
        return _parsed(parse, tree, path, found)
    if origin in (Union, types.UnionType):
        return _either(args, tree, path, found)
    if origin in (list, tuple):
        return _sequence(origin, args[0], tree, path, found)
    if origin is dict:
        return _mapping(args[1], tree, path, found)
    if kind is Inner:
        return _inner(tree, path, found)
    if is_dataclass(kind):
        if isinstance(tree, Table):
            made = fill(kind, tree, path, found)
            return BAD if made is None else made
        return _refuse(tree, path, found, "a mapping")
    if origin is Literal:
        if isinstance(tree, Leaf) and tree.value in args and not isinstance(tree.value, bool):
            return tree.value
        hint = nearest(str(tree.value) if isinstance(tree, Leaf) else "", map(str, args))
        return _refuse(tree, path, found, _wants(kind), hint)
    return _plain(kind, tree, path, found)


def _plain(kind: Any, tree: Tree, path: str, found: Findings) -> Any:
    if isinstance(tree, Leaf):
        value = tree.value
        if kind is str and tree.text is not None:
            return tree.text
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is kind and not (kind is float and not math.isfinite(value)):  # type: ignore[arg-type]
            return value
    hint = "put it in quotes" if kind is str and isinstance(tree, Leaf) and tree.value else ""
    return _refuse(tree, path, found, _wants(kind), hint)


def _parsed(parse: Any, tree: Tree, path: str, found: Findings) -> Any:
    if not isinstance(tree, Leaf):
        return _refuse(tree, path, found, "one value")
    try:
        return parse(tree.value)
    except (ValueError, TypeError, OverflowError) as e:
        found.add(tree.at, path, str(e))
        return BAD


def _either(kinds: tuple[Any, ...], tree: Tree, path: str, found: Findings) -> Any:
    """The value as the first type that it fits."""
    if isinstance(tree, Leaf) and tree.value is None and type(None) in kinds:
        return None
    others = [k for k in kinds if k is not type(None)]
    if len(others) == 1:
        return coerce(others[0], tree, path, found)
    for kind in others:
        if (value := coerce(kind, tree, path, Findings())) is not BAD:
            return value
    return _refuse(tree, path, found, " or ".join(map(_wants, others)))


def _sequence(origin: Any, kind: Any, tree: Tree, path: str, found: Findings) -> Any:
    if not isinstance(tree, Row):
        return _refuse(tree, path, found, "a list", "write it in brackets: [a, b]")
    values = [coerce(kind, item, f"{path}[{i}]", found) for i, item in enumerate(tree.items)]
    return BAD if BAD in values else origin(values)


def _mapping(kind: Any, tree: Tree, path: str, found: Findings) -> Any:
    if not isinstance(tree, Table):
        return _refuse(tree, path, found, "a mapping")
    values = {k: coerce(kind, v, dotted(path, k), found) for k, v in tree.items.items()}
    return BAD if BAD in values.values() else values


def _inner(tree: Tree, path: str, found: Findings) -> Any:
    tree = expand_tier(tree, path, found)
    if not isinstance(tree, Table):
        return _refuse(tree, path, found, "a tier", WRITTEN)
    use, cls = class_of("tier", tree, path, found)
    options = fill(cls.Options, tree, path, found, also={"use"}) if cls else None
    return BAD if cls is None or options is None else Inner(use, cls, options)


def _wants(kind: Any) -> str:
    """What a type wants, in words."""
    if get_origin(kind) is Literal:
        args = get_args(kind)
        return f"one of {', '.join(map(str, args))}" if len(args) > 1 else str(args[0])
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(kind, "a list")


def _refuse(tree: Tree, path: str, found: Findings, wants: str, hint: str = "") -> Any:
    found.add(tree.at, path, f"wants {wants}, got {shown(tree)}", hint)
    return BAD
