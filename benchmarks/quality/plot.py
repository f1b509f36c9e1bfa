"""KL against bits, all arms, as a PNG. Needs matplotlib: `pip install 'tierloom[quality]'`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

LOOKS = {
    "tierloom": ("#0b6e4f", "o", "tierloom"),
    "peer": ("#c1440e", "s", "LMCache's rule, re-implemented"),
    "literature": ("#5b6b7b", "^", "literature"),
}

TICKS = (1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 11, 16)
PLACES = ((8, 3, "left"), (8, -11, "left"), (-8, 3, "right"), (-8, -11, "right"), (8, 14, "left"))
"""Where a label may stand beside its point, in points; the first place that is free is taken."""


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the plot. Raises ImportError where there is no matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 6.8), dpi=110)
    labels = []
    for kind, (color, marker, label) in LOOKS.items():
        rows = {n: a for n, a in results["arms"].items() if a["kind"] == kind}
        if not rows:
            continue
        bits = [a["bits_per_element"] for a in rows.values()]
        kl = [a["kl"] for a in rows.values()]
        ends = [[abs(a["kl"] - a["kl_interval"][i]) for a in rows.values()] for i in (0, 1)]
        style = {"color": color, "fmt": marker, "ms": 6, "elinewidth": 0.8, "capsize": 2}
        axes.errorbar(bits, kl, yerr=ends, label=label, **style)
        for name, a in rows.items():
            at = (a["bits_per_element"], a["kl"])
            labels.append((name.removeprefix("LMCache's "), at, color))
    floor = results["arms"].get("none")
    if floor:
        axes.axhline(floor["kl"], color="#999999", lw=0.8, ls=":")
    axes.set(
        xlabel="bits per element, everything that is stored counted",
        ylabel="KL to full recompute, nats", yscale="log", xscale="log",
        xlim=(1.7, 18), xticks=TICKS, xticklabels=map(str, TICKS),
        title=f"{results['model']}: what fewer bits cost (chunks of {results['sizes']['chunk']} "
        "tokens; bars are 95 % intervals)",
    )  # fmt: skip
    axes.minorticks_off()
    axes.grid(alpha=0.25, which="both", lw=0.5)
    axes.legend(frameon=False)
    figure.tight_layout()
    _label(figure, axes, labels)
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def _label(figure: Any, axes: Any, labels: list[tuple[str, tuple[float, float], str]]) -> None:
    from matplotlib.transforms import Bbox

    points = [axes.transData.transform(at) for _, at, _ in labels]
    taken: list[Any] = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points]
    for text, at, color in labels:
        for x, y, side in PLACES:
            label = axes.annotate(
                text, at, (x, y), textcoords="offset points", ha=side, fontsize=8, color=color
            )
            box = label.get_window_extent(figure.canvas.get_renderer())
            if box.x0 > axes.bbox.x0 and not any(box.overlaps(other) for other in taken):
                break
            if (x, y, side) != PLACES[-1]:
                label.remove()
        taken.append(box)
