"""A graph cut into segments: what runs together, in one worker, with no queue between.

A pure function, so that what runs is never a guess: `tierloom explain` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tierloom.pipeline.config.spec import Graph, Node, WhenFull


@dataclass(frozen=True, slots=True)
class Segment:
    """Stages that hand batches on by a plain call."""

    nodes: tuple[Node, ...]
    source: int | None
    """Index of the segment it reads; None: the graph's input."""
    readers: tuple[int, ...]
    when_full: WhenFull
    depth: int
    width: int
    head: bool
    """Works on whole requests, before the plan is cut into batches."""

    @property
    def id(self) -> str:
        return "+".join(n.id for n in self.nodes)


def lower(graph: Graph) -> tuple[Segment, ...]:
    """Cut where a wire forks or has options of its own, and after the plan.

    Not where loop and pool change: a hop over a queue is not free, and batches overlap anyway, as
    each segment has several workers.
    """
    groups: list[list[Node]] = []
    source: list[int | None] = []
    where: dict[str | None, int] = {}
    for node in graph.nodes:
        at = where.get(node.source)
        last = groups[at][-1] if at is not None else None
        if at is not None and last is not None and _fuses(graph, last, node):
            groups[at].append(node)
            where[node.id] = at
        else:
            groups.append([node])
            source.append(at)
            where[node.id] = len(groups) - 1
    readers = [tuple(j for j, s in enumerate(source) if s == i) for i in range(len(groups))]
    return tuple(
        Segment(
            nodes=tuple(nodes),
            source=source[i],
            readers=readers[i],
            when_full=nodes[0].wire.when_full or _default(i, source[i], readers),
            depth=nodes[0].wire.depth,
            width=nodes[0].wire.width,
            head=nodes[0].gives.is_plan,
        )
        for i, nodes in enumerate(groups)
    )


def _fuses(graph: Graph, last: Node, node: Node) -> bool:
    return (
        node.source == last.id
        and len(graph.readers(last.id)) == 1
        and last.gives.is_plan == node.gives.is_plan
        and node.wire == type(node.wire)()
    )


def _default(i: int, source: int | None, readers: list[tuple[int, ...]]) -> WhenFull:
    """A slow branch never holds back its elder sibling."""
    return "block" if source is None or readers[source][0] == i else "drop"
