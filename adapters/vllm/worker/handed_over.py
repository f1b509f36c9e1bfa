"""Hand-offs in a worker: what it promises to other engines, and fetches from them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from tierloom.adapters.vllm.exchange.handoff_params import NOWHERE
from tierloom.adapters.vllm.exchange.messages import Fetch, Plan, WorkerReport, WorkerReports
from tierloom.adapters.vllm.worker.side import MANY, NAP, WorkerSide
from tierloom.pipeline.handoff.handoff import Handoff

log = logging.getLogger("tierloom.vllm")


class HandoffWorker(WorkerSide):
    """The worker's side of an engine that serves, or that others compute for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._fetching: dict[str, Future[int]] = {}

    def register_kv_caches(self, caches: Mapping[str, Any]) -> None:
        super().register_kv_caches(caches)
        if self.pipelines and self._report.info is not None:
            handoff = self.pipelines[0].pipeline.handoff
            serves = tuple(handoff.ranks) if handoff is not None else ()
            self._report.info = self._report.info._replace(serves=serves)

    def get_transfer_results(self, plan: Plan) -> Any:
        if plan.idle and self._fetching:
            self._woken.wait(NAP)
        return super().get_transfer_results(plan)

    def build_connector_worker_meta(self) -> WorkerReports | None:
        landed = [name for name, future in self._fetching.items() if future.done()]
        if landed:
            self._many = MANY
        reports = super().build_connector_worker_meta()
        if landed and not self.pipelines[0].pipeline.unseen:
            for name in landed:
                del self._fetching[name]
            mine = reports or WorkerReports({self._rank: WorkerReport()})
            mine.by_worker[self._rank].landed = landed
            return mine
        return reports

    def report(self) -> dict[str, Any]:
        return super().report() | {"fetching": len(self._fetching)}

    def _accept_plan(self, plan: Plan) -> None:
        fresh = plan is not self._plan
        super()._accept_plan(plan)
        handoff = self.pipelines[0].pipeline.handoff if fresh and self.pipelines else None
        if handoff is None:
            return
        if plan.ranks:
            handoff.ranks[:] = plan.ranks
        for ticket, chunks, receiver in plan.promised:
            handoff.promise(ticket, chunks)
            if receiver is not None and not self._rank:
                handoff.offer(ticket, receiver, chunks)
        for ticket in plan.settled:
            handoff.settle(ticket)
        for ticket in plan.released:
            handoff.release(ticket)
        for ticket, receiver in plan.answered:
            if not self._rank:
                handoff.end_offer(ticket, receiver)
        for fetch in plan.fetches:
            self._fetch(handoff, fetch)
        for name in plan.unwanted:
            if (future := self._fetching.pop(name, None)) is not None:
                future.cancel()

    def _fetch(self, handoff: Handoff, fetch: Fetch) -> None:
        at, future = fetch.landed, Future[int]()
        try:
            if at == NOWHERE:
                future.set_result(0)
            else:
                future = handoff.land(at.host, at.port, at.ticket, fetch.chunks, later=at.later)
        except RuntimeError as error:  # the pipeline has ended
            log.warning("request %s: nothing is fetched: %s", fetch.request, error)
            future.set_result(0)
        self._fetching[fetch.request] = future
        future.add_done_callback(lambda _: self._woken.set())
