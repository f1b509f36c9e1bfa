"""A checked pipeline as a picture: `store` above its tiers, `retrieve` below them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tierloom.pipeline.config.explain import option_words
from tierloom.pipeline.config.spec import Graph, Node, PipelineSpec
from tierloom.stages.display.amounts import size_text, time_text
from tierloom.stages.display.drawing import COLORS, FAINT, INK, Drawing, wide

_HIGH, _ROW, _GAP, _EDGE = 46, 62, 30, 16
_STORE, _RETRIEVE = COLORS[0], COLORS[1]


class _Spot(NamedTuple):
    """Where a box is."""

    x: float
    y: float
    wide: float

    @property
    def left(self) -> tuple[float, float]:
        return self.x, self.y + _HIGH / 2

    @property
    def right(self) -> tuple[float, float]:
        return self.x + self.wide, self.y + _HIGH / 2


def pipeline_svg(spec: PipelineSpec, stats: Mapping[str, Any] | None = None) -> str:
    """The graphs and tiers as SVG. `stats`: of the running pipeline, which then says below each
    stage how many chunks it had and how long one takes, and how full each tier is."""
    stats = stats or {"stages": {}, "tiers": {}}
    places: dict[str, dict[str, _Spot]] = {}
    y, tiers_at = 30.0, 0.0
    for name in ("store", "retrieve"):
        if name == "retrieve":
            tiers_at = y
            y += _HIGH + 50 if spec.tiers else 0
        if (graph := spec.graphs.get(name)) is not None:
            places[name], rows = _places(graph, y, stats)
            y += rows * _ROW + 34
    tiers = _tier_places(spec, tiers_at - 8, stats)
    spots = [s for graph in (*places.values(), tiers) for s in graph.values()]
    ends = sum(bool(n.keeps_in()) for graph in spec.graphs.values() for n in graph.nodes)
    width = max((s.right[0] for s in spots), default=200) + _EDGE + 8 * ends
    drawing = Drawing(width, y - 34)
    for name, boxes in places.items():
        top = min(s.y for s in boxes.values()) - 10
        drawing.text(_EDGE, top, name, size=12, bold=True, color=_color(name))
    for name, graph in spec.graphs.items():
        _arrows(drawing, graph, places[name], tiers, spec)
    for name, graph in spec.graphs.items():
        for node in graph.nodes:
            words = (node.id, node.use if node.use != node.id else "", _done(stats, name, node.id))
            _stage_box(drawing, places[name][node.id], words, _color(name))
    for name, spot in tiers.items():
        tier = spec.tiers[name]
        figures = stats["tiers"].get(name, {})
        down = bool(figures) and not figures["available"]
        words = (name, tier.use, "down" if down else _filled(figures))
        _stage_box(drawing, spot, words, COLORS[2], title=option_words(tier.options), round=18)
    return drawing.svg()


def _places(graph: Graph, top: float, stats: Mapping[str, Any]) -> tuple[dict[str, _Spot], int]:
    """Boxes of a tree from left to right, a row for each branch; and how many rows."""
    places: dict[str, _Spot] = {}
    row = 0

    def put(node: Node, x: float) -> None:
        nonlocal row
        words = (node.id, node.use, _done(stats, graph.name, node.id))
        places[node.id] = spot = _Spot(x, top + row * _ROW, max(72.0, *map(wide, words)) + 18)
        for i, reader in enumerate(graph.readers(node.id)):
            row += i > 0
            put(reader, x + spot.wide + _GAP)

    for i, node in enumerate(graph.readers(None)):
        row += i > 0
        put(node, _EDGE)
    return places, row + 1


def _tier_places(spec: PipelineSpec, y: float, stats: Mapping[str, Any]) -> dict[str, _Spot]:
    places, x = {}, _EDGE + 190.0
    for tier in spec.tiers.values():
        words = (tier.name, tier.use, _filled(stats["tiers"].get(tier.name, {})))
        places[tier.name] = spot = _Spot(x, y, max(96.0, *map(wide, words)) + 26)
        x += spot.wide + 46
    return places


def _arrows(
    drawing: Drawing, graph: Graph, at: dict[str, _Spot], tiers: dict[str, _Spot],
    spec: PipelineSpec,
) -> None:  # fmt: skip
    ends, lanes = [n for n in graph.nodes if n.keeps_in()], 0
    for node in graph.nodes:
        here = at[node.id]
        for reader in graph.readers(node.id):
            drawing.arrow(here.right, at[reader.id].left)
        for tier in node.keeps_in() if graph.name == "store" else ():
            lane = max(s.right[0] for s in at.values()) + 10 + 8 * lanes
            end, y = tiers[tier].x + tiers[tier].wide / 2 + 14, tiers[tier].y
            turn = y - 12 - 6 * max(0, len(ends) - 1 - lanes)
            drawing.line(here.right, (lane, here.left[1]), (lane, turn), (end, turn), color=_STORE)
            drawing.arrow((end, turn), (end, y), down=True, color=_STORE)
            lanes += 1
        for tier in node.reads(spec.tiers) if graph.name == "retrieve" else ():
            spot = tiers[tier]
            start, end = spot.x + spot.wide / 2, here.x + here.wide / 2
            drawing.arrow(
                (start, spot.y + _HIGH), (end, here.y), down=True, color=_RETRIEVE, dashed=True
            )


def _stage_box(
    drawing: Drawing, spot: _Spot, words: tuple[str, str, str], color: str, *, title: str = "",
    round: float = 5,
) -> None:  # fmt: skip
    """A name, what it is, and its figures, as far as there are any."""
    drawing.box(spot.x, spot.y, spot.wide, _HIGH, line=color, title=title, round=round)
    lines = [w for w in words if w]
    y = spot.y + _HIGH / 2 + 4 - 6.5 * (len(lines) - 1)
    for i, line in enumerate(lines):
        drawing.text(
            spot.x + spot.wide / 2, y + 13 * i, line, anchor="middle", bold=i == 0,
            color=FAINT if i else INK,
        )  # fmt: skip


def _done(stats: Mapping[str, Any], graph: str, stage: str) -> str:
    meter = stats["stages"].get(graph, {}).get(stage)
    if not meter or not meter["batches"]:
        return ""
    each = meter["seconds"] / max(1, meter["chunks"])
    broken = f", {meter['broken']} broken" if meter["broken"] else ""
    return f"{meter['chunks']} x {time_text(each)}{broken}"


def _filled(figures: Mapping[str, Any]) -> str:
    if not figures:
        return ""
    of = f" of {size_text(figures['capacity'])}" if figures["capacity"] else ""
    return f"{figures['objects']}: {size_text(figures['nbytes'])}{of}"


def _color(graph: str) -> str:
    return _STORE if graph == "store" else _RETRIEVE
