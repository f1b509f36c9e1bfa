"""A segment's stages as coroutines: metered, and run on the loop or in a thread, as each is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anyio

from tierloom.pipeline.config.segments import Segment
from tierloom.pipeline.run.meters import Meter, metered
from tierloom.pipeline.run.threads import Pool
from tierloom.stages.contract.batch import Batch
from tierloom.stages.contract.stage import BatchStage, RequestStage, Stage, UnderWay, runs_on_loop
from tierloom.stages.memory.held import held

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

    async def run(item: Any) -> None:
        if stage.is_quick(item):
            method(item)
            return
        with anyio.CancelScope(shield=True):
            under_way = await pool(method, item, leases=item.leases(), later=later)
            if under_way is not None:
                await _settled(under_way, item, pool, later)

    return run


async def _settled(under_way: UnderWay, batch: Batch, pool: Pool, later: int) -> None:
    """Until a device has made a batch's copies, and what is left of them is done. No thread of the
    pool waits for the device, which may have a whole forward pass to compute before them. Raises
    RuntimeError where the device has failed."""
    batch.launch()
    failed: list[Exception] = []
    with held(*batch.leases()):
        for mark in under_way.marks:
            try:
                await mark.passed()
            except Exception as error:  # noqa: PERF203
                failed.append(error)
            finally:
                batch.request.memory.in_use.leave()
    if failed:
        raise failed[0]
    await pool(under_way.settle, leases=batch.leases(), later=later)
