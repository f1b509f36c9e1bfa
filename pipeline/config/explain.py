"""A checked pipeline as text or as a Mermaid picture: what runs is never a guess."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NamedTuple, get_args, get_type_hints

from tierloom.pipeline.config.segments import Segment, lower
from tierloom.pipeline.config.spec import Graph, Node, PipelineSpec
from tierloom.stages.contract.stage import runs_on_loop
from tierloom.stages.display.amounts import size_text
from tierloom.stages.options import masked, parse_rate, parse_seconds, parse_size, seconds_text
from tierloom.stages.tiers.contract.tier import Inner


def explain(spec: PipelineSpec) -> str:
    """Tiers, then each graph as a tree of its stages, with segments, lanes, ports and wires."""
    lines = [f"pipeline {spec.name}, read from {spec.source}"]
    lines += [
        f"  {name}: {option_words(getattr(spec, name), all=True)}" for name in ("chunk", "budget")
    ]
    lines += [f"  order: {spec.order}, verify: {spec.verify}"]
    if spec.serve is not None:
        lines += [f"  serve: {option_words(spec.serve, all=True)}"]
    if spec.handoff is not None:
        lines += [f"  handoff: {option_words(spec.handoff, all=True)}"]
    if spec.tiers:
        lines += ["", "tiers"]
    for tier in spec.tiers.values():
        lines.append(f"  {tier.name}: {tier.use} {option_words(tier.options)}".rstrip())
        if breaker := option_words(tier.breaker):
            lines.append(f"    breaker: {breaker}")
    for graph in spec.graphs.values():
        lines += [
            "",
            f"graph {graph.name}: {option_words(graph.options, all=True)}",
            *_table(graph),
        ]
    return "\n".join(lines)


def mermaid(spec: PipelineSpec) -> str:
    """A flowchart: graphs as boxes of stages, tiers as cylinders between them."""
    lines = ["flowchart LR"]
    for graph in spec.graphs.values():
        lines.append(f"  subgraph {graph.name}")
        lines += [f'    {_name(graph, n)}["{_label(n)}"]' for n in graph.nodes]
        for node in graph.nodes:
            for reader in graph.readers(node.id):
                label = f"{node.gives.kind}@{node.gives.place}"
                lines.append(f'    {_name(graph, node)} -->|"{label}"| {_name(graph, reader)}')
        lines.append("  end")
    lines += [f'  tier_{t.name}[("{t.name}<br/>{t.use}")]' for t in spec.tiers.values()]
    for graph in spec.graphs.values():
        for node in graph.nodes:
            lines += [f"  {_name(graph, node)} ==> tier_{t}" for t in node.keeps_in()]
            lines += [f"  tier_{t} -.-> {_name(graph, node)}" for t in node.reads(spec.tiers)]
    return "\n".join(lines)


def option_words(options: Any, *, all: bool = False) -> str:
    """Options as they would be written, secrets masked; those left at their defaults only with
    `all`."""
    kinds = get_type_hints(type(options), include_extras=True)
    words = []
    for field in fields(options):
        value = getattr(options, field.name)
        if all or field.default is MISSING or value != field.default:
            word = masked(f"{field.name}: {_shown(kinds[field.name], value)}")
            words.append(word.replace(": ", " ", 1))
    return ", ".join(words)


class _StageLine(NamedTuple):
    """A stage as a line of a table."""

    stage: str
    segment: str
    runs_on: str
    gives: str
    wire: str


def _table(graph: Graph) -> Iterator[str]:
    where = {n.id: (i, s) for i, s in enumerate(lower(graph), start=1) for n in s.nodes}
    head = _StageLine("", "segment", "runs on", "gives", "wire")
    rows = [head, *_branches(graph, None, "", where)]
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(map(str.ljust, row, wide)).rstrip()


def _branches(
    graph: Graph, parent: str | None, indent: str, where: dict[str, tuple[int, Segment]]
) -> Iterator[_StageLine]:
    """Depth first; what has no sibling is right under what it reads."""
    readers = graph.readers(parent)
    for node in readers:
        joint, below = "", ""
        if len(readers) > 1:
            joint, below = ("└─ ", "   ") if node is readers[-1] else ("├─ ", "│  ")
        number, segment = where[node.id]
        wire = ""
        if node is segment.nodes[0]:
            wire = f"{segment.depth} deep, {segment.width} at once, {segment.when_full} when full"
        words = (
            f"{node.use}, {option_words(node.options)}" if option_words(node.options) else node.use
        )
        stage = f"{indent}{joint}{node.id}: {words}"
        runs_on = "loop" if runs_on_loop(node.cls.work()) else "pool"
        yield _StageLine(stage, str(number), runs_on, str(node.gives), wire)
        yield from _branches(graph, node.id, indent + below, where)


def _name(graph: Graph, node: Node) -> str:
    return f"{graph.name}_{node.id.replace('-', '_')}"


def _label(node: Node) -> str:
    return node.id if node.id == node.use else f"{node.id}<br/>{node.use}"


def _shown(kind: Any, value: Any) -> str:
    """A value as it would be written, with the unit that its type has."""
    if isinstance(value, Inner):
        return f"({value.use} {option_words(value.options)})"
    if is_dataclass(value):
        return f"({option_words(value, all=True)})"
    if isinstance(value, bool) or value is None:
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    marks = {m for k in (kind, *get_args(kind)) for m in getattr(k, "__metadata__", ())}
    if marks & {parse_size, parse_rate}:
        return size_text(value) + "/s" * (parse_rate in marks)
    if parse_seconds in marks:
        return seconds_text(value)
    return str(value)
