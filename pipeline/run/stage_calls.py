"""A segment's stages as coroutines: metered, and run on the loop or in a thread, as each is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anyio

from tierloom.pipeline.config.segments import Segment
from tierloom.pipeline.run.meters import Meter, metered
from tierloom.pipeline.run.threads import Pool
from tierloom.stages.contract.stage import BatchStage, RequestStage, Stage, runs_on_loop

StageCall = Callable[[Any], Awaitable[Any]]


def stage_calls(
    segment: Segment, stages: Mapping[str, Stage], meters: Mapping[str, Meter], pool: Pool
) -> list[StageCall]:
    """What a worker awaits in turn for each request (in the head) or batch (after it)."""
    calls: list[StageCall] = []
    for node in segment.nodes:
        stage, meter = stages[node.id], meters[node.id]
        if segment.head:
            assert isinstance(stage, RequestStage)
            plan = _called(stage, stage.plan, pool)
            calls.append(metered(plan, meter, lambda r: len(r.chunks)))
            continue
        assert isinstance(stage, BatchStage)
        if type(stage).prepare is not BatchStage.prepare:
            calls.append(stage.prepare)
        apply = _called(stage, stage.apply, pool)
        calls.append(metered(apply, meter, lambda batch: len(batch.resources.chunks)))
    return calls


def _called(stage: Stage, method: Callable[[Any], Any], pool: Pool) -> StageCall:
    """`method` as it is where the loop runs it, else in a thread, for a request or a batch that is
    not quick. Those of stores let others go first. The thread is waited for even when cancelled: it
    works on the engine's memory, and the request's `stop` ends it soon."""
    if runs_on_loop(method):
        return method
    later = int(stage.ctx.graph == "store")

    async def run(item: Any) -> Any:
        if stage.is_quick(item):
            return method(item)
        with anyio.CancelScope(shield=True):
            return await pool(method, item, leases=item.leases(), later=later)

    return run
