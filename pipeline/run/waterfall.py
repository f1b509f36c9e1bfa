"""The spans of requests as a picture: time goes to the right, a row for each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tierloom.stages.display.amounts import time_text
from tierloom.stages.display.drawing import COLORS, FAINT, LINE, Drawing, wide

if TYPE_CHECKING:
    from tierloom.pipeline.run.request_trace import StageSpan

_ROW, _TOP, _BARS, _RIGHT = 19, 26, 620, 90


def waterfall_svg(spans: Sequence[StageSpan], asked: Mapping[int, float]) -> str:
    """`asked`: when each request was made, in seconds as spans have them."""
    rows: dict[tuple[int, str], list[StageSpan]] = {}
    for span in sorted(spans, key=lambda s: (s.request, s.begin)):
        rows.setdefault((span.request, span.stage), []).append(span)
    if not rows:
        drawing = Drawing(320, 30)
        drawing.text(10, 19, "no request was worked on while this was traced", color=FAINT)
        return drawing.svg()
    requests = {number: row[0].graph for (number, _), row in rows.items()}
    left = 24 + max(wide(stage) for _, stage in rows)
    left = max(left, *(wide(f"{n} {graph}", 12) + 20 for n, graph in requests.items()))
    start = min(asked.get(s.request, s.begin) for s in spans)
    scale = _BARS / max(1e-9, max(s.end for s in spans) - start)
    drawing = Drawing(left + _BARS + _RIGHT, _TOP + _ROW * (len(rows) + len(requests)) + 12)
    _axis(drawing, left, scale)
    y, shown = float(_TOP), 0
    for (number, stage), row in rows.items():
        if number != shown:
            shown, graph = number, requests[number]
            mine = [s for s in spans if s.request == number]
            begin, end = asked.get(number, row[0].begin), max(s.end for s in mine)
            drawing.text(8, y + 14, f"{number} {graph}", size=12, bold=True)
            x = left + (begin - start) * scale
            drawing.box(x, y + 8, (end - begin) * scale, 4, fill=LINE, round=2)
            words = time_text(end - begin)
            drawing.text(left + (end - start) * scale + 6, y + 14, words, bold=True)
            y += _ROW
        color = COLORS[list(dict.fromkeys(s for n, s in rows if n == number)).index(stage) % 7]
        drawing.text(left - 8, y + 13, stage, anchor="end")
        for span in row:
            what = f"{stage}: {span.chunks} chunks, {time_text(span.end - span.begin)}"
            x, w = left + (span.begin - start) * scale, (span.end - span.begin) * scale
            drawing.box(x, y + 3, max(w, 1), 12, fill=color, line=color, round=1, title=what)
        busy = time_text(sum(s.end - s.begin for s in row))
        many = f" in {len(row)}" if len(row) > 1 else ""
        end_x = left + (max(s.end for s in row) - start) * scale
        drawing.text(end_x + 6, y + 13, busy + many, size=10, color=FAINT)
        y += _ROW
    return drawing.svg()


def _axis(drawing: Drawing, left: float, scale: float) -> None:
    """Lines at round times, some six of them."""
    step = 10.0**-7
    for factor in (2, 2.5, 2) * 12:
        if step * scale >= 90:
            break
        step *= factor
    at = 0.0
    while at * scale <= _BARS:
        x = left + at * scale
        drawing.line((x, _TOP - 8), (x, drawing.height - 8), color="#e4e7eb")
        drawing.text(x, _TOP - 12, time_text(at) if at else "0", size=10, color=FAINT)
        at += step
