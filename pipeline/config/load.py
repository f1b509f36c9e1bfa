"""A YAML file to a checked pipeline, or to every problem it has, at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tierloom.pipeline.config.coerce import fill, names_of
from tierloom.pipeline.config.ports import Draft, connect_ports
from tierloom.pipeline.config.presets import Source, read_config
from tierloom.pipeline.config.problems import Findings, Place, Problem, nearest
from tierloom.pipeline.config.resolve import class_of
from tierloom.pipeline.config.room import host_memory_of
from tierloom.pipeline.config.spec import (
    Breaker,
    Graph,
    GraphOptions,
    PipelineOptions,
    PipelineSpec,
    TierSpec,
    Wire,
)
from tierloom.pipeline.config.tier_urls import WRITTEN
from tierloom.pipeline.config.yaml_tree import Leaf, Row, Table, shown
from tierloom.stages.contract.stage import PortType
from tierloom.stages.display.amounts import size_text

GRAPHS = ("store", "retrieve")
_ID = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_TRIES = 5
_OUTSIDE = {"version", "extends", "tiers", "graphs"}
"""Keys of a file that are not options."""


def load_config(
    source: Source, overrides: Mapping[str, Any] | None = None, *, said_in: str = ""
) -> PipelineSpec:
    """Read and check a preset, a file or a mapping. Imports the classes it names, opens nothing.

    `overrides` maps dotted paths (`tiers.warm.path`) to values. `said_in`: where the user wrote
    what is in no file. Raises ConfigError, whose `problems` are all there are.
    """
    found = Findings()
    tree = read_config(source, overrides, found, said_in)
    spec = _pipeline(tree, found) if tree is not None else None
    found.raise_all()
    assert spec is not None
    return spec


def warnings(spec: PipelineSpec) -> tuple[Problem, ...]:
    """What runs but is probably not meant: tiers that nothing is kept in, or read from."""
    found = Findings()
    for name, graph in spec.graphs.items():
        stores = name == "store"
        used = {t for n in graph.nodes for t in (n.keeps_in() if stores else n.reads(spec.tiers))}
        for tier in spec.tiers.keys() - used:
            if stores and spec.tiers[tier].cls.read_only:
                continue
            what = "keeps nothing in it" if stores else "does not read it"
            found.add(spec.tiers[tier].place, f"tiers.{tier}", f"graph {name!r} {what}")
    return found.sorted()


def _pipeline(tree: Table, found: Findings) -> PipelineSpec | None:
    """The spec, whole only where nothing was found."""
    options = fill(PipelineOptions, tree, "", found, also=_OUTSIDE)
    tiers = {t.name: t for t in _tiers(tree, found)}
    named = tree.items.get("tiers")
    names = set(named.items) if isinstance(named, Table) else set()
    _check_served(tree, options, names, tiers, found)
    if "graphs" not in tree.items:
        found.add(tree.at, "graphs", "is missing", f"describe {' or '.join(GRAPHS)}, or both")
    graphs = {}
    for name, table, path in _entries(tree, "graphs", "", found):
        if name not in GRAPHS:
            found.add(table.at, path, f"there is no graph {name!r}", nearest(name, GRAPHS))
            continue
        graph_options = fill(GraphOptions, table, path, found, also={"stages"})
        if "stages" not in table.items:
            found.add(table.at, path, "has no stages")
        drafts = []
        for id, stage, at in _entries(table, "stages", path, found):
            drafts.append(_stage(id, stage, at, found))
            _check_tier_names(drafts[-1], stage, names, tiers, found)
        nodes = connect_ports(drafts, found)
        if options is not None and options.order == "native":
            _refuse_canonical(drafts, found)
        if name == "retrieve":
            _refuse_encoders(drafts, found)
        graphs[name] = Graph(name, graph_options or GraphOptions(), nodes)
    if len(found):
        return None
    assert options is not None
    given = {n: getattr(options, n) for n in names_of(PipelineOptions)}
    source = tree.at.file
    given["name"] = given["name"] or Path(source).stem.strip("<>")
    return PipelineSpec(**given, source=source, tiers=tiers, graphs=graphs)


def _tiers(tree: Table, found: Findings) -> Iterator[TierSpec]:
    """The tiers that are right so far."""
    taken = 0
    for name, table, path in _entries(tree, "tiers", "", found):
        use, cls = class_of("tier", table, path, found)
        shared = names_of(Breaker) - (names_of(cls.Options) if cls is not None else set())
        breaker = fill(Breaker, table.part(shared), path, found)
        if cls is None:
            continue
        options = fill(cls.Options, table, path, found, also=shared | {"use"})
        own = host_memory_of(cls, options)
        taken += sum(own.values())
        if sum(own.values()) and taken > (there := memory_here()):
            option = max(own, key=own.__getitem__)
            found.add(
                _place(table, option), path,
                f"tiers take {size_text(taken)} of a memory of {size_text(there)}",
                f"at most half of it is a good start: {option}: {there >> 31} GiB",
            )  # fmt: skip
        if breaker is not None and options is not None:
            if "timeout" not in shared:  # of one of several servers: a call may try some of them
                limit = max(breaker.timeout, _TRIES * options.timeout)
                breaker = replace(breaker, timeout=limit)
            yield TierSpec(name, use, cls, options, breaker, table.at._replace(text=""))


def _stage(id: str, table: Table, path: str, found: Findings) -> Draft:
    use, cls = class_of("stage", table, path, found)
    shared = names_of(Wire)
    draft = Draft(id, use, table.at, path, cls)
    draft.wire = fill(Wire, table.part(shared), path, found)
    if cls is not None:
        draft.options = fill(cls.Options, table, path, found, also=shared | {"use", "from"})
    source = table.items.get("from")
    if isinstance(source, Leaf) and isinstance(source.value, str):
        draft.source, draft.source_at = source.value, source.at
    elif source is not None:
        found.add(source.at, f"{path}.from", f"wants the id of a stage, got {shown(source)}")
    return draft


def _entries(
    tree: Table, section: str, path: str, found: Findings
) -> Iterator[tuple[str, Table, str]]:
    """Id, mapping and path of each thing in a section; what is not a mapping is reported."""
    path = f"{path}.{section}" if path else section
    whole = tree.items.get(section, Table({}, {}, tree.at))
    if not isinstance(whole, Table):
        found.add(whole.at, path, f"wants a mapping of ids, got {shown(whole)}")
        return
    for id, entry in whole.items.items():
        here = f"{path}.{id}"
        if not _ID.fullmatch(id):
            hint = "letters, digits, '-' and '_', a letter first"
            found.add(whole.keys[id], path, f"{id!r} is not an id", hint)
        elif isinstance(entry, Table):
            yield id, entry, here
        else:
            hint = WRITTEN if section == "tiers" else ""
            hint = f"there is no {id!r} to remove" if shown(entry) == "nothing" else hint
            found.add(whole.keys[id], here, f"wants a mapping, got {shown(entry)}", hint)


def _check_served(
    tree: Table, options: PipelineOptions | None, names: set[str], tiers: Mapping[str, TierSpec],
    found: Findings,
) -> None:  # fmt: skip
    """What is served lies in this process: else two engines could ask each other for ever. What is
    handed over lands in memory."""
    in_arena = any(tier.cls.in_arena for tier in tiers.values())
    if options is not None and options.handoff is not None and not in_arena:
        hint = "add a tier that uses memory"
        found.add(_place(tree, "handoff"), "handoff", "no tier keeps objects in memory", hint)
    if options is not None and options.handoff is not None and options.serve is None:
        for name in ("offers", "proxy"):
            if getattr(options.handoff, name):
                hint = "decoders and prefillers dial each other: say where this one listens"
                found.add(_place(tree, "handoff"), f"handoff.{name}", "needs `serve`", hint)
    if options is None or options.serve is None:
        return
    place, path = _place(tree, "serve"), "serve.tiers"
    for name in options.serve.tiers:
        if name not in names:
            found.add(place, path, f"there is no tier {name!r}", nearest(name, names))
        elif name in tiers and not tiers[name].cls.local:
            hint = "others reach it themselves; serve tiers that use memory or disk"
            found.add(place, path, f"tier {name!r} is not this process's own", hint)
    if options.serve.lend and not any(t.cls.in_arena for t in tiers.values()):
        hint = "what memory tiers have room for and do not use is lent: add one"
        found.add(place, "serve.lend", "no tier uses memory", hint)


def _check_tier_names(
    draft: Draft, table: Table, names: set[str], tiers: Mapping[str, TierSpec], found: Findings
) -> None:
    """The tiers that a stage's options name must be there, and of the kind it needs."""
    if draft.cls is None:
        return
    in_arena = {n for n, t in tiers.items() if t.cls.in_arena}
    for option in draft.cls.tier_options:
        tree = table.items.get(option)
        for leaf in tree.items if isinstance(tree, Row) else (tree,):
            if not isinstance(leaf, Leaf) or not isinstance(leaf.value, str):
                continue
            path, name = f"{draft.path}.{option}", leaf.value
            if name not in names:
                found.add(leaf.at, path, f"there is no tier {name!r}", nearest(name, names))
            elif option in draft.cls.arena_options and name in tiers and name not in in_arena:
                hint = nearest("", in_arena) or "add a tier that uses memory"
                found.add(leaf.at, path, f"tier {name!r} does not keep its objects in memory", hint)
            elif name in tiers and tiers[name].cls.read_only and not isinstance(tree, Row):
                hint = "name it where 'retrieve' looks; each engine keeps its own"
                found.add(leaf.at, path, f"tier {name!r} is only read", hint)


def _refuse_encoders(drafts: list[Draft], found: Findings) -> None:
    """Note the stages of `retrieve` that encode: frames are only ever decoded there."""
    for draft in drafts:
        if draft.cls is None:
            continue
        takes, gives = PortType.parse(draft.cls.takes), PortType.parse(draft.cls.gives)
        if gives.kind == "bytes" and takes.unit == "frame":
            hint = "'decode' undoes whatever codec an object was written with"
            found.add(draft.at, draft.path, f"{draft.use} encodes, which only 'store' does", hint)


def _refuse_canonical(drafts: list[Draft], found: Findings) -> None:
    """Note the stages that cannot work on an engine's own blocks."""
    for draft in drafts:
        if draft.cls is not None and draft.cls.canonical:
            cause = f"{draft.use} works on tokens and heads, which `order: native` does not know"
            found.add(draft.at, draft.path, cause, "order: canonical, or auto")


def _place(table: Table, key: str) -> Place:
    value = table.items.get(key)
    return table.at if value is None else value.at


def memory_here() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return there
    return min(there, int(limit)) if limit.isdigit() else there
