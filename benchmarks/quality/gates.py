"""What is promised of codecs on SmolLM2 with chunks of 256 tokens, and whether it holds.

One is met where the bits are within its bar and the whole interval of KL is; missed where the bits
are not, or the whole interval lies beyond; between, it is open: more documents would tell. A run
fails by a gate that is missed, not by a target (`must=False`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tierloom.adapters.quality.score import interval, ratio

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from tierloom.adapters.quality.score import Score


class Gate(NamedTuple):
    what: str
    arm: str
    bits: float
    """Most bits per element, everything counted."""
    kl: float | None
    """Most KL in nats; None: bit-exact."""
    beside: str = ""
    """The arm whose KL it is compared with, paired by document."""
    share: float | None = None
    """Most of that arm's KL, where the gate is relative."""
    must: bool = True
    """A run with it missed has failed; otherwise it is a target."""


GATES = (
    Gate("lossless, planes", "zstd", 11.4, None),
    Gate("lossless, rANS", "rans", 10.6, None),
    Gate("fp8, target", "fp8", 8.1, None, "LMCache's fp8", 0.5, must=False),
    Gate("high", "cachegen:high", 5.6, 1e-3, "int8 per token"),
    Gate("high, stretch", "cachegen:high calibrated", 5.0, 1e-3, "int8 per token", must=False),
    Gate("default", "cachegen:default", 3.6, 1.2e-2, "LMCache's cachegen L3"),
    Gate(
        "default, stretch",
        "cachegen:default calibrated",
        3.3,
        8e-3,
        "LMCache's cachegen L3",
        must=False,
    ),
    Gate("small", "cachegen:small", 2.6, 7e-2, "LMCache's cachegen L2"),
    Gate(
        "small, stretch",
        "cachegen:small calibrated",
        2.3,
        5e-2,
        "LMCache's cachegen L2",
        must=False,
    ),
    Gate("int4", "int4", 4.7, 8e-3, "KIVI-4"),
)


def judged(scores: Mapping[str, Score]) -> list[dict[str, Any]]:
    """Every gate whose arm was measured."""
    return [_judge(g, scores) for g in GATES if g.arm in scores]


def _judge(gate: Gate, scores: Mapping[str, Score]) -> dict[str, Any]:
    found = scores[gate.arm]
    row: dict[str, Any] = {"gate": gate.what, "arm": gate.arm, "must": gate.must}
    row["bits"] = round(found.bits, 3)
    row |= {"bits_bar": gate.bits, "kl": float(f"{found.kl:.5g}"), "kl_bar": gate.kl}
    if other := scores.get(gate.beside):
        share, ends = ratio(found.kls, other.kls)
        row |= {"beside": gate.beside, "kl_share": round(share, 4)}
        row |= {"kl_share_interval": [round(end, 4) for end in ends]}
    if gate.share is not None:
        row["kl_share_bar"] = gate.share
        verdict = _verdict(tuple(row["kl_share_interval"]), gate.share) if other else "open"
    elif gate.kl is not None:
        verdict = _verdict(interval(found.kls), gate.kl)
    else:
        verdict = "met" if all(o.exact for o in found.outcomes) else "missed"
    row["verdict"] = verdict if found.bits <= gate.bits else "missed"
    return row


def _verdict(ends: tuple[float, ...], bar: float) -> str:
    low, high = ends
    if high <= bar:
        return "met"
    return "missed" if low > bar else "open"
