"""Tiers written as URLs: `cold: redis://host:6379/0` says `{use: redis, url: redis://...}`.

A URL may also stand in `use`, beside other options. It is taken apart as soon as it is read, before
bases and overrides are merged: what one file writes as a URL, another may extend by id.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

from tierloom.pipeline.config.problems import Findings, nearest
from tierloom.pipeline.config.yaml_tree import Leaf, Table, Tree
from tierloom.stages import catalog

WRITTEN = "a tier is {use: ...}, or a URL"
"""A hint."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


def expand(tree: Table, found: Findings) -> Table:
    """A file's tree with every URL among its tiers taken apart."""
    tiers = tree.items.get("tiers")
    if not isinstance(tiers, Table):
        return tree
    items = {id: expand_tier(tier, f"tiers.{id}", found) for id, tier in tiers.items.items()}
    return Table(tree.items | {"tiers": Table(items, tiers.keys, tiers.at)}, tree.keys, tree.at)


def expand_tier(tree: Tree, path: str, found: Findings) -> Tree:
    """One tier's tree. A scheme that nobody knows is left in `use`, for `refusal` to answer."""
    if isinstance(tree, Leaf):
        if scheme_of(tree.value) is None:
            return tree
        tree = Table({"use": tree}, {"use": tree.at}, tree.at)
    use = tree.items.get("use") if isinstance(tree, Table) else None
    if not isinstance(tree, Table) or not isinstance(use, Leaf):
        return tree
    scheme = scheme_of(use.value)
    tier = catalog.schemes().get(scheme or "")
    if tier is None:
        return tree
    url, option = str(use.value), "url"
    if tier == "files":
        option, url = "path", unquote(url.partition("://")[2].removeprefix("localhost"))
    if option in tree.items:
        hint = f"write `use: {tier}`, or leave `{option}` out"
        found.add(tree.keys[option], path, f"{option!r} is in `use` already", hint)
    items = tree.items | {"use": Leaf(tier, use.at), option: Leaf(url, use.at)}
    return Table(items, tree.keys | {"use": use.at, option: use.at}, tree.at)


def scheme_of(value: object) -> str | None:
    """The scheme of a URL, lower case; None for what is no URL."""
    match = _URL.fullmatch(value) if isinstance(value, str) else None
    return match[1].lower() if match else None


def refusal(url: str) -> tuple[str, str]:
    """Why no tier can be reached by this URL, and a hint."""
    scheme, rest = url.split("://", 1)
    if scheme.lower() == "lm":
        hint = f"run `tierloom serve` there instead, and write tierloom://{rest}"
        return "lm:// is the protocol of LMCache's own server, which tierloom does not speak", hint
    known = catalog.schemes()
    return f"no tier has URLs that begin with {scheme}://", nearest(scheme.lower(), known)
