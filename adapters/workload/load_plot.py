"""The picture of a run: the first token by round, and over time."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tierloom.adapters.workload.openai_stream import Sample
from tierloom.stages.display.amounts import time_text
from tierloom.stages.display.drawing import COLORS, FAINT, LINE, LOST, Drawing
from tierloom.stages.errors import ConfigError

_PROGRAMS = {
    "rsvg-convert": ("rsvg-convert", "-o", "{png}", "{svg}"),
    "inkscape": ("inkscape", "{svg}", "--export-filename={png}"),
    "magick": ("magick", "{svg}", "{png}"),
}
"""Programs that make a PNG of an SVG."""
_W, _H, _TOP, _LEFT, _APART = 400.0, 240.0, 64.0, 70.0, 90.0


def check_plot(path: Path) -> None:
    """Raise ConfigError unless a picture of this kind can be made here: before the work."""
    if path.suffix not in (".svg", ".png"):
        raise ConfigError(f"--plot {path}: name a file that ends in .svg or .png")
    if path.suffix == ".png" and _program() is None:
        raise ConfigError(
            f"--plot {path}: a PNG is made by one of {', '.join(_PROGRAMS)}, and none is on PATH; "
            "install one (apt-get install librsvg2-bin), or name an .svg, which needs none"
        )


def write_plot(
    path: Path, figures: Mapping[str, Any], samples: Sequence[Sample], began: float, title: str
) -> None:
    """Write the picture. Raises OSError, CalledProcessError."""
    svg = path.with_suffix(".svg")
    svg.write_text(load_svg(figures, samples, began, title), encoding="utf-8")
    if path.suffix == ".png" and (program := _program()):
        words = [word.format(svg=svg, png=path) for word in _PROGRAMS[program]]
        subprocess.run(words, check=True, capture_output=True, timeout=60)
        svg.unlink()


def load_svg(
    figures: Mapping[str, Any], samples: Sequence[Sample], began: float, title: str
) -> str:
    """Left: p50, p90 and p99 of the time to the first token, by round. Right: each request's, when
    it was sent."""
    drawing = Drawing(2 * _W + 2 * _LEFT + _APART, _TOP + _H + 66)
    drawing.text(16, 26, title, size=14, bold=True)
    arms = [row["arm"] for row in figures["all"]]
    good = [s for s in samples if s.warm and not s.error]
    most = _round_limit(max([1e-3, *(s.ttft for s in good)]))
    _by_round(drawing, figures, arms, most)
    _over_time(drawing, [s for s in samples if s.warm], arms, began, most)
    if len(arms) > 1:
        for i, arm in enumerate(arms):
            x = drawing.width - 190 + 95 * i
            drawing.dot(x, 22, color=_color(arms, arm))
            drawing.text(x + 9, 26, f"{arm} cache" if arm == "with" else arm)
    return drawing.svg()


def _by_round(
    drawing: Drawing, figures: Mapping[str, Any], arms: Sequence[str], most: float
) -> None:
    rows = [row for row in figures["rounds"] if row["ttft_s"]]
    numbers = sorted({row["round"] for row in rows})
    place = {n: _LEFT + _W * (i + 0.5) / max(1, len(numbers)) for i, n in enumerate(numbers)}
    _axes(drawing, _LEFT, "time to the first token, by round: p50, and up to p90 and p99", most)
    for n in numbers if len(numbers) <= 24 else numbers[:: len(numbers) // 12]:
        drawing.text(place[n], _TOP + _H + 18, str(n), anchor="middle", color=FAINT)
    drawing.text(_LEFT + _W / 2, _TOP + _H + 38, "round", anchor="middle", color=FAINT)
    for k, arm in enumerate(arms):
        color, aside = _color(arms, arm), 6.0 * (k - (len(arms) - 1) / 2)
        mine = [(place[row["round"]] + aside, row["ttft_s"]) for row in rows if row["arm"] == arm]
        for x, found in mine:
            y50, y90, y99 = (_y(found[q], most) for q in ("p50", "p90", "p99"))
            drawing.line((x, y50), (x, y90), color=color)
            drawing.line((x, y90), (x, y99), color=color, dashed=True)
            drawing.line((x - 5, y90), (x + 5, y90), color=color)
            drawing.line((x - 3, y99), (x + 3, y99), color=color)
        if len(mine) > 1:
            drawing.line(*((x, _y(found["p50"], most)) for x, found in mine), color=color)
        for x, found in mine:
            said = ", ".join(f"{q} {time_text(v)}" for q, v in found.items())
            drawing.dot(x, _y(found["p50"], most), color=color, title=said)


def _over_time(
    drawing: Drawing, samples: Sequence[Sample], arms: Sequence[str], began: float, most: float
) -> None:
    left = _LEFT + _W + _APART
    _axes(drawing, left, "each request, when it was sent; red: failed", most)
    end = max([1.0, *(s.sent - began for s in samples)])
    for part in range(5):
        x = left + _W * part / 4
        drawing.text(x, _TOP + _H + 18, f"{end * part / 4:.0f}", anchor="middle", color=FAINT)
    drawing.text(left + _W / 2, _TOP + _H + 38, "seconds", anchor="middle", color=FAINT)
    for s in samples[:: 1 + len(samples) // 2000]:
        x = left + _W * (s.sent - began) / end
        color = LOST if s.error else _color(arms, s.arm)
        said = f"session {s.session}, round {s.round}: {s.error or time_text(s.ttft)}"
        drawing.dot(x, _TOP + _H if s.error else _y(s.ttft, most), color=color, title=said)


def _axes(drawing: Drawing, left: float, title: str, most: float) -> None:
    drawing.text(left, _TOP - 14, title, size=12)
    for part in range(5):
        y = _TOP + _H * (1 - part / 4)
        drawing.line((left, y), (left + _W, y), color="#e4e7eb" if part else LINE)
        drawing.text(left - 8, y + 4, time_text(most * part / 4) if part else "0", anchor="end",
                     color=FAINT)  # fmt: skip


def _round_limit(seconds: float) -> float:
    """The next number above that four lines divide into numbers that can be read."""
    unit = float(10 ** math.floor(math.log10(seconds)))
    return next(unit * n for n in (1, 2, 4, 6, 8, 10, 12) if unit * n >= seconds)


def _y(seconds: float, most: float) -> float:
    return _TOP + _H * (1 - min(1.0, seconds / most))


def _color(arms: Sequence[str], arm: str) -> str:
    return COLORS[0] if arm == "with" else COLORS[2]


def _program() -> str | None:
    return next((name for name in _PROGRAMS if shutil.which(name)), None)
