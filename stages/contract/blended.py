"""A retrieve that may bring text which was captured elsewhere: what was found, what is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tierloom.stages.blend.policies import POLICIES, Amount, Mask, Patchwork, Scores, choose
from tierloom.stages.kv.text import Run


@dataclass(slots=True)
class Blended:
    """Made by the caller's thread, filled in by the stages that plan."""

    asked: Sequence[Run] | None = None
    """What the caller has found; None: `lookup` is to find it."""
    work: Patchwork | None = None
    """What was found; None: nothing yet, or nothing."""
    fixed: bool = False
    """The caller computes by the plan already: nothing more is placed than it says."""
    policy: str = "none"
    amount: Amount = field(default_factory=lambda: Amount(0, 0.0))
    heads: int = 0
    """Tokens after each seam that are computed where a policy that needs scores gets none."""
    attended: float = 0.0
    """Of the attention that was scored, what fell on reused tokens that are computed."""
    measured: Callable[[float, float], None] = lambda computing, loading: None
    """Told how many seconds computing what was chosen took, and loading the rest."""

    @property
    def needs(self) -> str:
        """What `mask` wants as `scores`: nothing, scores or deviations; see `policies.py`."""
        return POLICIES[self.policy].needs

    def left_out(self) -> Mask | None:
        """[tokens] is computed whatever the scores: its rows are not placed."""
        if self.work is None or self.needs != "nothing":
            return None
        return self.mask()

    def mask(self, scores: Scores | None = None) -> Mask:
        """[tokens] is computed, when all that was planned comes. `scores`: [tokens], or those of
        the first tokens; without them a policy that needs some chooses nothing but heads."""
        assert self.work is not None
        if self.needs != "nothing":
            given = np.zeros(0) if scores is None else scores
            amount = self.amount
            if scores is None:
                amount = amount._replace(heads=self.heads, share=0.0)
            padded = np.full(self.work.tokens, -np.inf)
            padded[: len(given)] = given
            mask = choose(self.policy, self.work, amount, padded)
            self.attended = _part_of(padded, mask & self.work.covered())
            return mask
        return choose(self.policy, self.work, self.amount)


def _part_of(scores: Scores, mask: Mask) -> float:
    """What `mask` takes of all scores; 0 where none is a positive number."""
    known = np.where(np.isfinite(scores), scores, 0.0)
    total = float(known.sum())
    return float(known[mask].sum()) / total if total > 0 else 0.0
