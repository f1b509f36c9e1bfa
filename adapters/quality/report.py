"""`tierloom quality`: what a codec costs a model in quality, and how many bits it takes.

Documents that every machine has are computed once in full precision; then their KV is stored
through the codec, brought back, and the model reads on (`score.py` computes the figures).
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from tierloom.adapters.demo.screen import screen_for, write_figures
from tierloom.adapters.quality.documents import Sizes
from tierloom.adapters.quality.measure import Reference
from tierloom.adapters.quality.score import Score
from tierloom.adapters.quality.subject import Subject
from tierloom.stages.errors import require

if TYPE_CHECKING:
    from rich.console import Console


def run_quality(
    model: str, codec: str, json_path: Path | None = None, documents: int | None = None
) -> int:
    """Measure `codec` on `model` (`smollm2` or a folder), print it, and write it as JSON.

    Raises ConfigError for an unknown codec, option or model, before anything is computed.
    """
    require("hf", "transformers")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the codecs
    from tierloom.adapters.quality.arms import check_codec
    from tierloom.adapters.quality.documents import Sizes
    from tierloom.adapters.quality.measure import references
    from tierloom.adapters.quality.subject import load_subject

    check_codec(codec)
    console = screen_for(json_path)
    sizes = Sizes()
    with console.status(f"Loading {model}"):
        subject = load_subject(model)
    with console.status("Computing the documents in full precision"):
        captured = references(subject, sizes, documents)
    report = judge(subject, codec, captured, sizes, console)
    console.print(screen(report))
    write_figures(json_path, report)
    return 0


def judge(
    subject: Subject, codec: str, captured: list[Reference], sizes: Sizes, console: Console
) -> dict[str, Any]:
    """The report of one codec, with the noise floor beside it."""
    from tierloom.adapters.quality.arms import NONE, Stored
    from tierloom.adapters.quality.measure import score

    scores: list[Score] = []
    started = time.perf_counter()
    for name in (NONE, codec):
        with console.status(f"Measuring {name}"), Stored(name, subject, sizes.chunk) as arm:
            scores.append(score(subject, arm, captured))
    plain, found = (s.report() for s in scores)
    return {
        "model": subject.name,
        "codec": codec,
        **found,
        "kl_floor": plain["kl"],
        "needle_nll_floor": plain["needle_nll"],
        "chunk_tokens": sizes.chunk,
        "suffix_tokens": sizes.suffix,
        "digests": {r.document.name: r.document.digest for r in captured},
        "seconds": round(time.perf_counter() - started, 1),
    }


def screen(report: dict[str, Any]) -> Table:
    """A report as a table."""
    table = Table("figure", "value", "what it is", title=f"{report['codec']} on {report['model']}")
    low, high = report["kl_interval"]
    spread = f"nats; 95 % {low:.2g} to {high:.2g}" if report["documents"] > 1 else "nats"
    rows: list[tuple[str, str, str]] = [
        ("bits per element", f"{report['bits_per_element']:.2f}", "everything that is stored"),
        ("KL", f"{report['kl']:.3g}", spread),
        ("KL of bf16 itself", f"{report['kl_floor']:.3g}", "the noise floor"),
        ("KL p95", f"{report['kl_p95']:.3g}", "over positions"),
        ("dNLL", f"{report['dnll']:+.4f}", "nats per token"),
        ("top-1", f"{report['top1']:.1%}", "same most likely token"),
    ]
    if report["needle_nll"] is not None:
        said = f"{report['needle_nll_floor']:.3f} with bf16; {report['needle_recall']:.0%} are said"
        rows.append(("needle NLL", f"{report['needle_nll']:.3f}", said))
    rows.append(("documents", str(report["documents"]), ", ".join(report["per_document"])))
    if report["bit_exact"]:
        rows.append(("bit-exact", "yes", "what came back is what was stored"))
    for row in rows:
        table.add_row(*row)
    return table
