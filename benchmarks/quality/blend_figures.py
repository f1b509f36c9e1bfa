"""Figures of `quality.blend` as JSON, as a page, and as a plot of KL against recomputed share."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from tierloom.adapters.quality.score import interval, ratio

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

SETS = ("rag", "seq", "edit")
POINTS = {
    "heads": ("#0b6e4f", ("none", "heads 12%", "heads 30%")),
    "probe": ("#1f4e9c", ("none", "probe 12%", "probe 30%")),
    "deviation": ("#c1440e", ("none", "deviation 12%", "peer", "deviation 30%")),
    "random": ("#999999", ("none", "random 12%", "random 30%")),
}
"""What is drawn as a line: (color, arms in order of share)."""


def write(folder: Path, out: Path) -> None:
    """`folder` holds a file for each set; `out` is the name without its ending."""
    found = {
        name: figures(json.loads(path.read_text()))
        for kind in SETS for name in (kind, f"{kind}-choosing")
        if (path := folder / f"{name}.json").exists()
    }  # fmt: skip
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    out.with_suffix(".md").write_text(_page(found), "utf-8")
    draw({k: v for k, v in found.items() if k in SETS}, out.with_suffix(".png"))


def figures(documents: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Of one set: each arm's mean KL with its interval, its share, and its ratio to the peer."""
    arms = {}
    peer = np.array([d["peer"][0] for d in documents.values()])
    for name in next(iter(documents.values())):
        kl, share = np.array([d[name] for d in documents.values()]).T
        value, ends = ratio(kl, peer)
        arms[name] = {
            "kl": _short(kl.mean()), "kl_interval": [_short(x) for x in interval(kl)],
            "share": _short(share.mean()), "of_peer": [_short(x) for x in (value, *ends)],
        }  # fmt: skip
        if "peer, alone" in documents[next(iter(documents))]:
            value, ends = ratio(kl, np.array([d["peer, alone"][0] for d in documents.values()]))
            arms[name]["of_peer_alone"] = [_short(x) for x in (value, *ends)]
    return {"documents": list(documents), "arms": arms}


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the plot. Raises ImportError where there is no matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(1, len(found), figsize=(5 * len(found), 4.6), squeeze=False)
    for axes, (kind, result) in zip(grid[0], found.items(), strict=True):
        arms = result["arms"]
        for label, (color, names) in POINTS.items():
            rows = [arms[n] for n in names]
            kl = [a["kl"] for a in rows]
            ends = [[abs(a["kl"] - a["kl_interval"][i]) for a in rows] for i in (0, 1)]
            axes.errorbar([100 * a["share"] for a in rows], kl, yerr=ends, color=color,
                          marker="o", ms=4, elinewidth=0.6, capsize=2, label=label)  # fmt: skip
        for name, mark in (("default", "*"), ("peer", "s"), ("peer, alone", "x")):
            axes.plot(100 * arms[name]["share"], arms[name]["kl"], mark, color="black", ms=9,
                      label=name, fillstyle="none")  # fmt: skip
        axes.set(title=f"{kind}: {len(result['documents'])} documents", yscale="log",
                 xlabel="recomputed token-layers, %", ylabel="KL, nats")  # fmt: skip
        axes.grid(alpha=0.25, which="both", lw=0.5)
        axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None}, dpi=110)
    pyplot.close(figure)


def _page(found: dict[str, Any]) -> str:
    lines = [
        "# What blending costs SmolLM2-135M in quality",
        "",
        "Float32, CPU. KL over the suffix, nats. Share: recomputed token-layers / all of the",
        "context, the probe and check layers included. Pieces were captured behind the prompt's",
        "beginning and a foreign passage, or alone where it says so. Ratios are to K deviation at",
        "layer 1, 15 %, the peer's rule, on the same KV; 95 % intervals, bootstrap paired by",
        "document. `choosing`: other texts, on which the default's parameters were chosen.",
    ]  # fmt: skip
    for kind, result in found.items():
        lines += ["", f"## {kind}: {len(result['documents'])} documents", "",
                  "| arm | share | KL | 95 % | of the peer's | of the peer's, alone |",
                  "|---|---:|---:|---|---|---|"]  # fmt: skip
        for name, a in result["arms"].items():
            low, high = a["kl_interval"]
            alone = a.get("of_peer_alone")
            beside = [f"{r[0]:.2f} ({r[1]:.2f} to {r[2]:.2f})" if r else ""
                      for r in (a["of_peer"], alone)]  # fmt: skip
            lines.append(
                f"| {name} | {a['share']:.1%} | {a['kl']:.4g} | {low:.3g} to {high:.3g} | "
                f"{beside[0]} | {beside[1]} |"
            )
    return "\n".join(lines) + "\n"


def _short(value: Any) -> float:
    return float(f"{value:.5g}")
