"""What became of a request, as a picture."""

from __future__ import annotations

from collections.abc import Mapping

from tierloom.stages.display.amounts import size_text, time_text
from tierloom.stages.display.drawing import COLORS, FAINT, LOST, Drawing, wide

_LEFT, _LONG = 96, 420


def receipt_svg(
    tokens: int, nbytes: int, lost: Mapping[str, int], tiers: Mapping[str, int], seconds: float,
    blended: int = 0,
) -> str:  # fmt: skip
    """A bar for each tier and each cause of loss, as long as it had chunks."""
    bars = [(name, n, COLORS[i % len(COLORS)]) for i, (name, n) in enumerate(tiers.items())]
    bars += [(f"lost: {name}", n, LOST) for name, n in lost.items()]
    left = max([_LEFT, *(wide(name) + 24 for name, _, _ in bars)])
    drawing = Drawing(left + _LONG + 110, 34 + 20 * max(1, len(bars)))
    more = f" and {blended:,} blended" if blended else ""
    rate = f", {size_text(nbytes / seconds)}/s" if nbytes and seconds else ""
    words = f"{tokens:,} tokens{more}: {size_text(nbytes)} in {time_text(seconds)}{rate}"
    drawing.text(10, 19, words, size=12, bold=True)
    most = max([1, *(n for _, n, _ in bars)])
    for i, (name, n, color) in enumerate(bars):
        y = 30 + 20 * i
        drawing.text(left - 8, y + 12, name, anchor="end", color=color)
        drawing.box(left, y + 2, n / most * _LONG, 13, fill=color, line=color, round=1)
        words = f"{n:,} chunk{'s' * (n != 1)}"
        drawing.text(left + n / most * _LONG + 6, y + 12, words, size=10, color=FAINT)
    if not bars:
        drawing.text(10, 42, "no chunk was taken, delivered or lost", color=FAINT)
    return drawing.svg()
