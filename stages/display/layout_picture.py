"""A layout as a picture: a box for each letter of a layer's tensor, outermost first."""

from __future__ import annotations

from collections.abc import Sequence

from tierloom.stages.display.drawing import COLORS, FAINT, Drawing, wide

_LETTERS = {
    "2": "K and V", "B": "blocks", "N": "tokens", "H": "heads", "D": "channels", "S": "slots",
    "C": "K | V channels",
}  # fmt: skip


def layout_svg(order: str, shape: Sequence[int], stride: Sequence[int], words: str) -> str:
    """`shape` and `stride` of one layer's tensor, in elements; `words`: what is below it."""
    letters = order.removesuffix("-KT")
    drawing = Drawing(max(wide(words) + 24, 20 + 112 * len(letters)), 112)
    drawing.text(10, 18, order, size=13, bold=True)
    for i, (letter, size, step) in enumerate(zip(letters, shape, stride, strict=True)):
        x = 10 + 112 * i
        drawing.box(x, 28, 104, 54, line=COLORS[i % len(COLORS)])
        drawing.text(x + 52, 46, f"{size:,}", size=13, bold=True, anchor="middle")
        drawing.text(x + 52, 60, _LETTERS[letter], anchor="middle")
        drawing.text(x + 52, 75, f"{step:,} apart", size=10, color=FAINT, anchor="middle")
    drawing.text(10, 101, words, color=FAINT)
    return drawing.svg()
