"""A segment's stages as coroutines: metered, and in the lane that each one asks for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anyio

from tierloom.pipeline.config.segments import Segment
from tierloom.pipeline.run.meters import Meter, metered
from tierloom.pipeline.run.threads import Pool
from tierloom.stages.contract.stage import LoopStage, Stage

Step = Callable[[Any], Awaitable[Any]]


def steps(
    segment: Segment, stages: Mapping[str, Stage], meters: Mapping[str, Meter], pool: Pool
) -> list[Step]:
    """What a worker awaits in turn for each ticket (in the head) or batch (behind it)."""
    made: list[Step] = []
    for node in segment.nodes:
        stage, meter = stages[node.id], meters[node.id]
        if segment.head:
            plan = stage.plan_async if isinstance(stage, LoopStage) else _pooled(stage.plan, pool)
            made.append(metered(plan, meter, lambda ticket: len(ticket.pieces)))
            continue
        if isinstance(stage, LoopStage):
            run: Step = stage.apply_async
        else:
            made.append(stage.prepare)
            run = _pooled(stage.apply, pool)
        made.append(metered(run, meter, lambda batch: len(batch.scope.pieces)))
    return made


def _pooled(fn: Callable[[Any], Any], pool: Pool) -> Step:
    """`fn` in a thread, for a ticket or a batch. It is waited for even when cancelled: it works on
    the engine's memory, and the ticket's `stop` ends it soon."""

    async def run(item: Any) -> Any:
        with anyio.CancelScope(shield=True):
            return await pool(fn, item, leases=item.leases())

    return run
