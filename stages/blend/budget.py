"""How many tokens a blend may compute, and whether it is worth while."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tierloom.stages.blend.policies import Amount, Patchwork
from tierloom.stages.options import Share

HEADS = 16
"""Tokens behind each seam that `heads` computes, where it is not said."""
STEP = 0.25
"""Part of the way to its bound that the share goes with each blend."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlendOptions:
    """Which tokens are computed, where a prompt is made of passages kept elsewhere."""

    policy: Literal["none", "heads", "deviation", "probe"] = "probe"
    """Which reused tokens are computed: `none`; `heads`, the first ones after each seam; by
    `deviation` at a check layer; `probe`: heads, then those that the question attends to, the more
    the nearer they are to a seam."""
    heads: int | None = None
    """Tokens computed after each seam, where text follows other text than it was captured after.
    Default: 16 with `heads`, and where nobody can say what is attended to; else 0."""
    share: Share = 0.10
    """Of reused tokens, what is computed besides heads."""
    ceiling: Share = 0.12
    """Of reused tokens: `share` and heads are cut to this together."""
    adapt: bool = False
    """`share` falls towards `floor` while computing takes longer than loading, and rises towards
    `ceiling` while it takes less: answers then depend on how fast both were."""
    floor: Share = 0.02
    """The least that `adapt` leaves of `share`."""
    layer: int = 1
    """Check layer of `deviation`: all tokens are computed up to it."""
    of: Literal["k", "v", "both"] = "k"
    """What is compared at the check layer."""
    least: int = 64
    """Reused tokens below which a prompt is not blended."""
    worth: Literal["auto", "always", "never"] = "auto"
    """`auto`: blend where that ends sooner than computing all that follows the exact prefix."""

    def __post_init__(self) -> None:
        if self.adapt and not self.floor <= self.share <= self.ceiling:
            raise ValueError(
                f"adapt wants floor <= share <= ceiling, got {self.floor}, {self.share}, "
                f"{self.ceiling}"
            )


@dataclass(slots=True)
class BlendBudget:
    """The share that a blend may compute now. One per pipeline; any thread."""

    options: BlendOptions
    share: float = -1.0
    """Of reused tokens, besides heads; within floor and ceiling once a blend was measured."""

    def __post_init__(self) -> None:
        self.share = self.options.share if self.share < 0 else self.share

    def amount(self) -> Amount:
        """What the next blend may choose."""
        heads = self.heads if self.options.policy == "heads" else self.options.heads or 0
        return Amount(heads, self.share, self.options.ceiling)

    @property
    def heads(self) -> int:
        """Tokens after each seam, where nothing else says what is computed."""
        return HEADS if self.options.heads is None else self.options.heads

    def measured(self, computing: float, loading: float) -> None:
        """Seconds that a blend computed and loaded: with `adapt` the slower one gets less to do.
        What is not positive and finite is no measurement, and changes nothing."""
        if not self.options.adapt or not (
            0 < computing < float("inf") and 0 < loading < float("inf")
        ):
            return
        bound = self.options.floor if computing > loading else self.options.ceiling
        self.share += STEP * (bound - self.share)

    def worth_blending(
        self, work: Patchwork, rate: float | None, exact: float | None, blend: float | None
    ) -> bool:
        """Whether to blend, rather than load the exact prefix alone or compute everything.

        `rate`: tokens/s that are computed. `exact`, `blend`: seconds to load the exact prefix; to
        load it and the runs. None, where that was not measured yet: blend, to measure it. Loading
        and computing overlap, so a blend takes the longer of the two.
        """
        reused = int(work.covered().sum())
        if self.options.worth == "never" or reused < max(1, self.options.least):
            return False
        if self.options.worth == "always" or not rate or exact is None or blend is None:
            return True
        behind = work.tokens - work.exact
        heads = int(work.heads(self.amount().heads).sum()) if self.options.policy != "none" else 0
        computed = behind - reused + min(reused, heads + self.share * reused)
        others = min(work.tokens / rate, exact + behind / rate)
        return max(blend, computed / rate) < others
