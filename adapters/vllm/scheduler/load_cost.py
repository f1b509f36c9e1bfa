"""Whether a load is worth it, from how fast this engine computes and how fast its tiers read."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from tierloom.stages.directory.chunk_directory import Part
from tierloom.stages.ops.load_or_recompute import worth_loading

if TYPE_CHECKING:
    from tierloom.adapters.vllm.exchange.messages import WorkerInfo  # which imports vLLM

STEP_TOKENS = 128
"""Tokens that a step must compute for its speed to count as the engine's prefill speed."""
SLOW = 256e6
"""Bytes per second of the slowest tier that is worth waiting for."""


class LoadCost:
    """Used by the scheduler's thread alone."""

    def __init__(self, overlap: int) -> None:
        """`overlap`: steps that the engine has in flight at once."""
        self.rate = 0.0
        """Tokens/s of prefill; 0: not known yet."""
        self.costs: dict[str, tuple[float, float]] = {}
        """Tier to (seconds before the first byte, seconds per byte)."""
        self._overlap = overlap
        self._steps: deque[tuple[float, int]] = deque()

    def step(self, tokens: int) -> None:
        """A step begins that computes `tokens`. It ends when the next one begins, or with several
        in flight a later one: the engine never idles right after a prefill."""
        now = time.monotonic()
        self._steps.append((now, tokens))
        if len(self._steps) > self._overlap:
            began, computed = self._steps.popleft()
            if computed >= STEP_TOKENS:
                rate = computed / max(1e-6, now - began)
                self.rate = 0.8 * self.rate + 0.2 * rate if self.rate else rate

    def cut(self, info: WorkerInfo, plan: list[Part], computed: int, total: int) -> list[Part]:
        """The head of a plan that is loaded sooner than computed. `computed` tokens of it are there
        already, and the prompt has `total`."""
        if info.worth == "never":
            return []
        if info.worth == "always" or not self.rate:
            return plan
        costs, there, tier = [], computed, ""
        for part in plan:
            tokens, there = max(0, part.tokens - there), max(0, there - part.tokens)
            latency, per_byte = self.costs.get(part.tier, (0.0, 0.0))
            first = latency if tokens and part.tier != tier else 0.0
            tier = part.tier if tokens else tier
            costs.append((tokens, first + tokens * info.token_bytes * per_byte))
        return plan[: worth_loading(costs, total - computed, self.rate)]

    def seconds(self, info: WorkerInfo, tokens: int) -> float:
        """How long a load may take: what a slow tier needs, at most twice the time to compute."""
        slow = tokens * info.token_bytes / SLOW
        if self.rate:
            slow = min(slow, 2 * tokens / self.rate)
        return max(info.deadline, slow)
