"""blend: which tokens of a blended retrieve the engine computes.

    mend: {use: blend, policy: probe, share: 10 %}

Between `lookup: {want: anywhere}` and `get`. What is computed whatever the scores is not placed.
"""

from __future__ import annotations

from tierloom.stages.blend.budget import BlendBudget, BlendOptions
from tierloom.stages.contract.request import Request
from tierloom.stages.contract.stage import Context, RequestStage


class Blend(RequestStage):
    """Gives a request its policy, or takes its excerpts away where they are not worth it."""

    Options = BlendOptions
    takes = "plan@host/request"
    gives = "plan@host/request"

    def __init__(self, options: BlendOptions, ctx: Context) -> None:
        super().__init__(options, ctx)
        self.budget = BlendBudget(options)

    def plan(self, request: Request) -> None:
        blended = request.blend
        if blended is None or blended.work is None:
            return
        rate = request.prefill_rate or None
        exact = self._seconds(request, excerpts=False)
        all_of_it = self._seconds(request, excerpts=True)
        if self.budget.worth_blending(blended.work, rate, exact, all_of_it):
            blended.policy, blended.amount = self.options.policy, self.budget.amount()
            blended.heads, blended.measured = self.budget.heads, self.budget.measured
        else:
            blended.work = None
            request.chunks = [c for c in request.chunks if c.excerpt is None]

    def _seconds(self, request: Request, *, excerpts: bool) -> float | None:
        """Seconds to read the plan from its tiers; None: not measured yet."""
        g, total = self.ctx.geometry, 0.0
        for chunk in request.chunks:
            if chunk.source is None or (chunk.excerpt is not None and not excerpts):
                continue
            tier = self.ctx.tiers[chunk.source.tiers[0]]
            seconds = tier.cost(g.frame_bytes(g.layers, chunk.source.rows))
            if seconds is None:
                return None
            total += seconds
        return total
