"""Whether a process does its work: `/readyz`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Readiness:
    """No reason names an address: this is told to everybody."""

    status: Literal["ready", "degraded", "unready"]
    reasons: list[str]
    """Of `degraded`: which of the colder tiers do not work. Of `unready`: why nothing does."""


def readiness(parts: Mapping[str, Mapping[str, Any]], draining: str = "") -> Readiness:
    """Of a process whose parts have these figures (see `samples`). `draining`: why it takes nothing
    new; empty: it does."""
    fatal, worse = [draining] * bool(draining), list[str]()
    if not parts:
        fatal.append("nothing is open yet")
    for name, part in parts.items():
        where = f"part {name}: " if len(parts) > 1 else ""
        for what, is_fatal in _troubles(part):
            (fatal if is_fatal else worse).append(where + what)
    if fatal:
        return Readiness("unready", fatal)
    return Readiness("degraded" if worse else "ready", worse)


def _troubles(part: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """What does not work, and whether nothing works without it."""
    if "error" in part:
        return [(str(part["error"]), True)]
    found = [("caching is off", True)] if part["off"] is not None else []
    if part.get("draining"):
        found.append(("it was ordered to drain", True))
    if not part["tiers"]:
        found.append(("its tiers are not open yet", True))
    for i, (tier, figures) in enumerate(part["tiers"].items()):
        if figures["reads_down_since"]:
            when = _clock(figures["reads_down_since"])
            found.append((f"tier {tier}: reads fail since {when}", i == 0))
        elif figures["writes_down_since"]:
            when = _clock(figures["writes_down_since"])
            found.append((f"tier {tier}: takes nothing since {when}", False))
    return found


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
