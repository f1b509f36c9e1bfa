"""YAML to a tree in which every value knows its file, line and column.

A file may say `extends: NAME` (a preset in `configs/`) or `extends: PATH` (relative to itself): the
two are merged mapping by mapping, the extending file on top. Tiers, graphs and stages merge by id;
`id: null` removes one, and one whose `use` changes is replaced whole, since the options of one kind
mean nothing to another. A tier may be a URL (`shorthand.py`). `${VAR}` and `${VAR:-default}` are
read from the environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

from tierloom.pipeline.config.problems import Findings, Place, nearest
from tierloom.pipeline.config.tier_urls import expand
from tierloom.pipeline.config.yaml_tree import Leaf, Scalar, Table, Tree, from_python, parse

VERSION = 1

Source: TypeAlias = str | os.PathLike[str] | Mapping[str, Any]
"""A preset's name, a path, or what a YAML file would hold."""


def read_config(
    source: Source, overrides: Mapping[str, Any] | None, found: Findings, said_in: str = ""
) -> Table | None:
    """The whole tree, bases merged and overrides applied. None: nothing could be read at all.

    Overrides map dotted paths (`tiers.warm.path`) to values; they win over every file. `said_in` is
    what messages call the place of what is in no file.
    """
    if isinstance(source, Mapping):
        at = Place(said_in or "<mapping>")
        whole = _extend(from_python(source, at, "", found), Path(), found, ())
    else:
        name = os.fspath(source)
        file = _find(name, Place(said_in or name), Path(), found)
        whole = _extend(parse(file, found), file.parent, found, ()) if file else None
    for path, value in (overrides or {}).items():
        at = Place(said_in or "<overrides>")
        whole = whole and _override(whole, str(path), value, at, found)
    return whole


def presets() -> list[str]:
    """Names of the pipelines that come with the package."""
    folder = resources.files("tierloom") / "configs"
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))


def _extend(
    tree: Tree | None, folder: Path, found: Findings, above: tuple[str, ...]
) -> Table | None:
    """The tree on top of what it extends. `above`: the files that extend it."""
    if tree is None:
        return None
    if not isinstance(tree, Table):
        found.add(tree.at, "", "a pipeline is a mapping", f"begin with 'version: {VERSION}'")
        return None
    _check_version(tree, found)
    tree = expand(tree, found)
    base = tree.items.get("extends")
    if base is None:
        return tree
    if not isinstance(base, Leaf) or not isinstance(base.value, str):
        found.add(base.at, "extends", "wants a preset's name or a path", nearest("", presets()))
        return tree
    file = _find(base.value, base.at, folder, found)
    under = parse(file, found, base.at) if file else None
    if file is None or under is None:
        return tree
    above = (*above, os.path.realpath(tree.at.file))
    if os.path.realpath(file) in above:
        chain = " -> ".join(os.path.basename(f) for f in (*above, str(file)))
        found.add(base.at, "extends", f"goes in a circle: {chain}")
        return tree
    whole = _extend(under, file.parent, found, above)
    return tree if whole is None else _merge(whole, tree, ())


def _find(name: str, asked: Place, folder: Path, found: Findings) -> Path | None:
    """A word is a preset; what has a `/` or a `.` is a path."""
    if "/" in name or "." in name:
        return folder / os.path.expanduser(name)
    if name in presets():
        return Path(str(resources.files("tierloom") / "configs" / f"{name}.yaml"))
    hint = f"{nearest(name, presets())}; a file is named with its folder or ending, as in ./{name}"
    found.add(asked, "", f"no preset is called {name!r}", hint)
    return None


def _check_version(tree: Table, found: Findings) -> None:
    version = tree.items.get("version")
    if version is None:
        found.add(tree.at, "version", "is missing", f"begin the file with 'version: {VERSION}'")
    elif not isinstance(version, Leaf) or version.value != VERSION or version.value is True:
        found.add(
            version.at, "version", f"is not {VERSION}",
            f"this tierloom reads 'version: {VERSION}'; a newer file needs a newer tierloom",
        )  # fmt: skip


def _holds_ids(path: tuple[str, ...]) -> bool:
    """Whether the mapping at `path` is one of things named by id."""
    return path in {("tiers",), ("graphs",)} or (
        len(path) == 3 and path[0] == "graphs" and path[2] == "stages"
    )


def _merge(under: Tree, over: Tree, path: tuple[str, ...]) -> Any:
    """`over` on top of `under`; every value keeps the place where it was written."""
    if not isinstance(under, Table) or not isinstance(over, Table):
        return over
    by_id = _holds_ids(path)
    kinds = [_value(t.items["use"]) for t in (under, over) if "use" in t.items]
    if _holds_ids(path[:-1]) and len(set(kinds)) > 1:
        return over
    items, keys = dict(under.items), {**under.keys, **over.keys}
    for key, value in over.items.items():
        if key not in items:
            items[key] = value
        elif by_id and isinstance(value, Leaf) and value.value is None:
            del items[key]
        else:
            items[key] = _merge(items[key], value, (*path, key))
    return Table(items, keys, over.at)


def _value(tree: Tree) -> Scalar:
    return tree.value if isinstance(tree, Leaf) else None


def _override(tree: Table, path: str, value: Any, at: Place, found: Findings) -> Table:
    """One value put at a dotted path. The ids that it goes through must be there."""
    *parents, last = path.split(".")
    here: Tree | None = tree
    for i, name in enumerate(parents):
        names = here.items if isinstance(here, Table) else {}
        if _holds_ids(tuple(parents[:i])) and name not in names:
            where = ".".join(parents[:i])
            found.add(at, path, f"no {name!r} in {where}", nearest(name, names))
            return tree
        here = names.get(name)
    layer = Table({last: from_python(value, at, path, found)}, {last: at}, at)
    for name in reversed(parents):
        layer = Table({name: layer}, {name: at}, at)
    merged: Table = _merge(tree, expand(layer, found), ())
    return merged
