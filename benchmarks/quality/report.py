"""The results as a table in markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

COLUMNS = (
    "arm", "bits/element", "at 2,048", "x smaller", "KL (95 %)", "KL p95", "dNLL", "top-1",
    "needle NLL", "recall",
)  # fmt: skip
KINDS = {
    "tierloom": "tierloom, through a real pipeline; all bytes of its files",
    "peer": "a peer's rule, re-implemented: the product was not run",
    "literature": "baselines of the literature, re-implemented",
}


def about(results: dict[str, Any]) -> str:
    m = results["machine"]
    return (
        f"{m['cpu']}, {m['cores']} cores, Linux {m['kernel']}, Python {m['python']}, "
        f"torch {m['torch']}, transformers {m['transformers']}"
    )


def markdown(results: dict[str, Any]) -> str:
    sizes = results["sizes"]
    contexts = " and ".join(f"{n:,}" for n in sizes["contexts"])
    how = (
        f"{len(results['documents'])} documents; contexts of {contexts} tokens in chunks of "
        f"{sizes['chunk']}, then {sizes['suffix']} given tokens read on what came back, against "
        "full recompute in float32. KL and dNLL in nats, with 95 % bootstrap intervals over "
        "documents. What each figure means: `benchmarks/quality/README.md`."
    )
    head = [f"# Quality: {results['model']}", "", about(results) + ".", "", how, ""]
    lines = [*head, *_arms(results)]
    if results["gates"]:
        lines += ["", "## Gates and targets", "", *_gates(results["gates"])]
    if results["absent"]:
        lines += ["", f"Not in this build: {', '.join(results['absent'])}."]
    names = ", ".join(f"{n} ({d})" for n, d in results["documents"].items())
    lines += ["", f"Documents, and the digests of their tokens: {names}."]
    return "\n".join(lines) + "\n"


def _arms(results: dict[str, Any]) -> list[str]:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    for kind, title in KINDS.items():
        rows = {n: a for n, a in results["arms"].items() if a["kind"] == kind}
        if rows:
            lines.append(f"| *{title}* |" + " |" * (len(COLUMNS) - 1))
            lines += [_arm(n, a) for n, a in rows.items()]
    return lines


def _arm(name: str, arm: dict[str, Any]) -> str:
    low, high = arm["kl_interval"]
    nll, recall = arm["needle_nll"], arm["needle_recall"]
    cells = (
        f"`{name}`" if arm["kind"] == "tierloom" else name,
        f"{arm['bits_per_element']:.2f}",
        f"{arm['bits_per_element_2048']:.2f}" if arm.get("bits_per_element_2048") else "",
        f"{16 / arm['bits_per_element']:.1f}",
        f"{arm['kl']:.2g} ({low:.2g} to {high:.2g})" + (", bit-exact" * arm["bit_exact"]),
        f"{arm['kl_p95']:.2g}", f"{arm['dnll']:+.4f}", f"{arm['top1']:.3f}",
        "" if nll is None else f"{nll:.3f}", "" if recall is None else f"{recall:.2f}",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _gates(gates: list[dict[str, Any]]) -> list[str]:
    lines = ["| gate | arm | bits | bar | KL | bar | beside | verdict |", "|---" * 8 + "|"]
    for g in gates:
        beside = ""
        if "kl_share" in g:
            low, high = g["kl_share_interval"]
            bar = f", bar {g['kl_share_bar']}" if "kl_share_bar" in g else ""
            beside = f"{g['kl_share']:.2g} ({low:.2g} to {high:.2g}) of {g['beside']}{bar}"
        bar = "" if g["kl_bar"] is None else f"{g['kl_bar']:.2g}"
        lines.append(
            f"| {g['gate']} | `{g['arm']}` | {g['bits']:.2f} | {g['bits_bar']} | {g['kl']:.2g} "
            f"| {bar} | {beside} | {g['verdict']} |"
        )
    return lines
