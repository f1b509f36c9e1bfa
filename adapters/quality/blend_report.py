"""`tierloom quality --blend`: what a policy costs a model in quality, beside the peer's.

Prompts of one set (`blend_sets.py`) are put together of pieces that were kept elsewhere; the model
reads on, and is compared with itself after computing everything.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from rich.table import Table

from tierloom.adapters.demo.screen import screen_for, write_figures
from tierloom.adapters.quality.score import interval, ratio
from tierloom.stages.blend.budget import BlendBudget, BlendOptions
from tierloom.stages.blend.policies import policy_of
from tierloom.stages.errors import ConfigError, require

if TYPE_CHECKING:
    from tierloom.adapters.quality.blend_arms import BlendCost
    from tierloom.adapters.quality.subject import Subject


def run_blend(
    model: str, policy: str, kind: str, json_path: Path | None, documents: int | None
) -> int:
    """Measure `policy` with its default amounts on the set `kind`, print it, write it as JSON.

    Raises ConfigError for an unknown policy, set or model, LayoutError for a model that cannot be
    blended.
    """
    require("hf", "transformers")
    from tierloom.adapters.quality.blend_sets import JUDGED, Kind
    from tierloom.adapters.quality.subject import load_subject

    policy_of(policy)
    if kind not in get_args(Kind):
        raise ConfigError(f"--set {kind!r}: it is one of {', '.join(get_args(Kind))}")
    console = screen_for(json_path)
    with console.status(f"Loading {model}"):
        subject = load_subject(model)
    with console.status(f"Measuring {policy} on {kind}"):
        report = measured_blend(subject, policy, kind, documents or JUDGED)
    console.print(_screen(report))
    write_figures(json_path, report)
    return 0


def measured_blend(subject: Subject, policy: str, kind: Any, limit: int) -> dict[str, Any]:
    """Figures of the first `limit` prompts: KL in nats, `share` of token-layers that were computed;
    ratios with 95 % intervals, paired by prompt. Raises LayoutError, InputError for no prompt."""
    from tierloom.adapters.quality.blend_arms import PEER, BlendArm, Case, selective_of
    from tierloom.adapters.quality.blend_sets import prompts
    from tierloom.stages.errors import InputError

    options, started = BlendOptions(policy=policy), time.perf_counter()  # type: ignore[arg-type]
    arms = {
        "kl": BlendArm(policy, *BlendBudget(options).amount(), layer=options.layer, of=options.of),
        "kl_peer": PEER, "kl_peer_alone": PEER._replace(alone=True), "kl_none": BlendArm("none"),
    }  # fmt: skip
    found: dict[str, dict[str, BlendCost]] = {}
    selective = selective_of(subject)
    for prompt in prompts(kind, subject.encode):
        if len(found) == limit:
            break
        if len(prompt.ids) + len(prompt.suffix) < subject.positions:
            case = Case(subject, selective, prompt)
            found[prompt.name] = {name: case.judge(arm) for name, arm in arms.items()}
    if not found:
        raise InputError(f"no prompt of {kind} is short enough for a model of {subject.positions}")
    kls = {name: np.array([d[name].kl for d in found.values()]) for name in arms}
    return {
        "model": subject.name, "policy": policy, "set": kind,
        **{name: _digits(float(values.mean())) for name, values in kls.items()},
        "kl_interval": [_digits(x) for x in interval(kls["kl"])],
        **{f"of_{name}": _ratio(kls["kl"], kls[name]) for name in list(arms)[1:]},
        "share": _digits(float(np.mean([d["kl"].share for d in found.values()]))),
        "share_peer": _digits(float(np.mean([d["kl_peer"].share for d in found.values()]))),
        "documents": len(found),
        "per_document": {
            name: {k: _digits(b.kl) for k, b in d.items()} for name, d in found.items()
        },
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def _ratio(values: Any, others: Any) -> list[float]:
    """The ratio of the means, and its interval's ends."""
    value, (low, high) = ratio(values, others)
    return [_digits(x) for x in (value, low, high)]


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def _screen(report: dict[str, Any]) -> Table:
    title = f"{report['policy']} on {report['set']}, {report['model']}"
    table = Table("figure", "value", "what it is", title=title)
    for key, what in (
        ("kl", "KL, nats, over the suffix"), ("kl_none", "nothing computed"),
        ("kl_peer", "the peer's rule: K deviation, 15 %"),
        ("kl_peer_alone", "the same, on passages captured alone"),
    ):  # fmt: skip
        of = report.get(f"of_{key}")
        beside = f"; this is {of[0]:.2f} of it ({of[1]:.2f} to {of[2]:.2f})" if of else ""
        table.add_row(key, f"{report[key]:.3g}", what + beside)
    table.add_row("share", f"{report['share']:.1%}", "recomputed token-layers, the probe included")
    table.add_row("documents", str(report["documents"]), "")
    return table
