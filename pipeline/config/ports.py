"""Which stage reads which: sources, circles, an order to run in, and whether the ports fit.

Without `from` a stage reads the nearest stage above it whose output can be read; what a `put` or a
`scatter` gives is a receipt, which nobody reads. The first stage reads the graph's input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tierloom.pipeline.config.problems import Findings, Place, nearest
from tierloom.pipeline.config.spec import Node, Wire
from tierloom.stages import catalog
from tierloom.stages.contract.stage import BatchStage, PortType, RequestStage, Stage

INPUT = PortType("tokens", "host", "request")
"""What a request brings into either graph."""
RECEIPT = "receipt"
"""The kind that ends a path."""


@dataclass(slots=True, eq=False)
class Draft:
    """A stage as written; `cls` is None where its class is unknown or cannot be loaded."""

    id: str
    use: str
    at: Place
    path: str
    cls: type[Stage] | None = None
    options: Any = None
    wire: Wire | None = None
    source: str | None = None
    """Id in `from`, then also the default."""
    source_at: Place | None = None

    @property
    def ends(self) -> bool:
        """Whether nobody can read it."""
        return self.cls is not None and PortType.parse(self.cls.gives).kind == RECEIPT


def connect_ports(drafts: list[Draft], found: Findings) -> tuple[Node, ...]:
    """Nodes in running order. Every problem of the graph's shape and ports is noted in `found`.

    What is returned is whole only when nothing was found.
    """
    by_id = {d.id: d for d in drafts}
    _find_sources(drafts, by_id, found)
    order = _order(drafts, by_id, found)
    nodes = _fit(order, by_id, found)
    read = {d.source for d in drafts}
    for draft in drafts:
        if draft.cls is not None and not draft.ends and draft.id not in read:
            message = f"no stage reads what it gives ({draft.cls.gives})"
            hint = f"remove it, or let a stage read it with 'from: {draft.id}'"
            found.add(draft.at, draft.path, message, hint)
    return tuple(nodes)


def _find_sources(drafts: list[Draft], by_id: dict[str, Draft], found: Findings) -> None:
    """Set each draft's source; a bad one is noted and dropped."""
    above: str | None = None
    for draft in drafts:
        if draft.source_at is None:
            draft.source = above
        elif draft.source not in by_id:
            message = f"there is no stage {draft.source!r} to read"
            hint = nearest(str(draft.source), by_id.keys() - {draft.id})
            found.add(draft.source_at, draft.path, message, hint)
        elif by_id[draft.source].ends:
            message = f"{draft.source!r} gives only a receipt, which cannot be read"
            found.add(draft.source_at, draft.path, message, "read the stage that it reads")
        if not draft.ends:
            above = draft.id


def _order(drafts: list[Draft], by_id: dict[str, Draft], found: Findings) -> list[Draft]:
    """Sources before their readers, otherwise as written. Stages of a circle are left out."""
    placed: dict[str, Draft] = {}
    reported: set[str] = set()
    for draft in drafts:
        chain: list[Draft] = []
        here: Draft | None = draft
        while here is not None and here.id not in placed and here not in chain:
            chain.append(here)
            here = by_id.get(here.source) if here.source is not None else None
        if here is not None and here in chain:
            circle = chain[chain.index(here) :]
            if not reported & {d.id for d in circle}:
                first = min(circle, key=drafts.index)
                turn = circle.index(first)
                ids = [d.id for d in [*circle[turn:], *circle[:turn], first]]
                found.add(
                    first.source_at or first.at, first.path, f"reads itself: {' <- '.join(ids)}",
                    "let one of them read a stage outside the circle",
                )  # fmt: skip
            reported |= {d.id for d in circle}
            continue
        placed.update((d.id, d) for d in reversed(chain))
    return list(placed.values())


def _fit(order: list[Draft], by_id: dict[str, Draft], found: Findings) -> Iterator[Node]:
    """Check each wire; `same` in an output takes the word of what comes in."""
    flows: dict[str, PortType | None] = {}
    for draft in order:
        comes = INPUT if draft.source is None else flows.get(draft.source)
        flows[draft.id] = None
        if draft.cls is None:
            continue
        takes, gives = PortType.parse(draft.cls.takes), PortType.parse(draft.cls.gives)
        if comes is None:
            if "same" in gives:
                continue
        elif words := comes.clashes(takes):
            sender = "the request" if draft.source is None else draft.source
            differ = f"{' and '.join(words)} differ{'s' if len(words) == 1 else ''}"
            message = f"{sender} gives {comes} but {draft.use} takes {takes} ({differ})"
            found.add(draft.at, draft.path, message, _bridge(comes, takes))
        flows[draft.id] = gives = gives.after(comes or takes)
        kind = RequestStage if gives.is_plan else BatchStage
        if not issubclass(draft.cls, kind):
            message = f"{draft.use} gives {gives}, so it must be a {kind.__name__}"
            found.add(draft.at, draft.path, message, "subclass that, or correct takes and gives")
        yield Node(
            id=draft.id, use=draft.use, cls=draft.cls, options=draft.options, source=draft.source,
            takes=takes, gives=gives, wire=draft.wire or Wire(), place=str(draft.at),
        )  # fmt: skip


def _bridge(comes: PortType, wanted: PortType) -> str:
    """A hint: the stages of the catalogue that turn the one into the other."""
    fit = []
    for name in sorted(catalog.STAGES):
        try:
            cls: type[Stage] = catalog.load_class("stage", name)
        except (ImportError, AttributeError):
            continue
        gives = PortType.parse(cls.gives)
        if not comes.clashes(PortType.parse(cls.takes)) and not gives.after(comes).clashes(wanted):
            fit.append(repr(name))
    return f"put {' or '.join(fit)} between them" if fit else ""
