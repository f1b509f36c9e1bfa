"""Pictures as SVG text, and tables as HTML text, for notebooks. Imports nothing but `html`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

INK, FAINT, LINE, PAPER = "#1f2933", "#7b8794", "#9aa5b1", "#ffffff"
COLORS = ("#2f6fb5", "#3f9b5f", "#c9822b", "#8a5ab5", "#2f9d9d", "#c2557a", "#8c8c3a")
"""For series and kinds; readable on white and on black."""
LOST = "#c0392b"
_FONT = "Helvetica,Arial,sans-serif"


class Drawing:
    """Shapes one over another, in pixels from the top left."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self._parts: list[str] = []

    def box(
        self, x: float, y: float, w: float, h: float, *, fill: str = PAPER, line: str = LINE,
        round: float = 5, title: str = "",
    ) -> None:  # fmt: skip
        """A rectangle. `title`: what is shown where the pointer is on it."""
        hint = f"<title>{escape(title)}</title>" if title else ""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(w, 0.1):.1f}" height="{h:.1f}" '
            f'rx="{round:g}" fill="{fill}" stroke="{line}">{hint}</rect>'
        )

    def line(self, *points: tuple[float, float], color: str = LINE, dashed: bool = False) -> None:
        path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.path(path, color=color, dashed=dashed)

    def path(
        self, path: str, *, color: str = LINE, dashed: bool = False, fill: str = "none"
    ) -> None:
        """A path in SVG's own words."""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(f'<path d="{path}" fill="{fill}" stroke="{color}"{dash}/>')

    def arrow(
        self, start: tuple[float, float], end: tuple[float, float], *, down: bool = False,
        color: str = LINE, dashed: bool = False,
    ) -> None:  # fmt: skip
        """A curve that leaves and arrives level, or upright with `down`, and a head at its end."""
        (x, y), (u, v) = start, end
        if down:
            mid, back = (y + v) / 2, 5 if v > y else -5
            bend = f"{x:.1f} {mid:.1f} {u:.1f} {mid:.1f}"
            head = f"M{u:.1f} {v:.1f} l-3.5 {-back * 1.3:.1f} l7 0 Z"
        else:
            mid = (x + u) / 2
            bend = f"{mid:.1f} {y:.1f} {mid:.1f} {v:.1f}"
            head = f"M{u:.1f} {v:.1f} l-6.5 -3.5 l0 7 Z"
        self.path(f"M{x:.1f} {y:.1f} C{bend} {u:.1f} {v:.1f}", color=color, dashed=dashed)
        self.path(head, color=color, fill=color)

    def dot(self, x: float, y: float, *, color: str, title: str = "") -> None:
        hint = f"<title>{escape(title)}</title>" if title else ""
        self._parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}">{hint}</circle>'
        )

    def text(
        self, x: float, y: float, words: str, *, size: float = 11, color: str = INK,
        anchor: str = "start", bold: bool = False,
    ) -> None:  # fmt: skip
        """`y`: of the line that letters sit on. `anchor`: start, middle or end."""
        weight = ' font-weight="bold"' if bold else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-family="{_FONT}" font-size="{size:g}" '
            f'fill="{color}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'
        )

    def svg(self) -> str:
        """The whole picture; on a white sheet, so that it can be read in dark notebooks, too."""
        w, h = self.width, self.height
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{w:.0f}" height="{h:.0f}" '
            f'viewBox="0 0 {w:.0f} {h:.0f}" style="max-width:100%;height:auto">'
            f'<rect width="{w:.0f}" height="{h:.0f}" fill="{PAPER}"/>{"".join(self._parts)}</svg>'
        )


def wide(words: str, size: float = 11) -> float:
    """About how many pixels a text takes."""
    return len(words) * size * 0.56


def table_html(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; all but the first column are to the right."""

    def cells(tag: str, row: Sequence[object]) -> str:
        sides = ("left", *("right",) * (len(row) - 1))
        return "".join(
            f'<{tag} style="text-align:{side}">{escape(str(cell))}</{tag}>'
            for side, cell in zip(sides, row, strict=True)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    top = f"<thead><tr>{cells('th', head)}</tr></thead>" if head else ""
    return f"<table>{top}<tbody>{body}</tbody></table>"
