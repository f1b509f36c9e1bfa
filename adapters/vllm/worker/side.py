"""The connector in a worker: loads into vLLM's blocks, saves from them, reports how they went.

Nothing here waits for a tier. Loads and saves are tickets of the pipelines; each step checks which
have ended. Blocks are touched only while vLLM keeps them: a load's until it is reported, a save's
until it is captured; if vLLM is about to reuse them sooner, the step waits briefly for the save or
cancels it. Methods are named as the hooks that call them.

Model runners call the hooks of a step in different orders, and some leave one out: with a draft
model, `get_transfer_results` is called before `wait_for_save`, which a pipeline stage that is not
the last never calls. So every hook that brings the plan accepts it first (`_accept_plan`), and
nothing depends on which hook that was.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from tierloom.adapters.engine.pipeline_parts import touch_ahead
from tierloom.adapters.engine.spans_option import trace_requests
from tierloom.adapters.vllm.exchange.messages import (
    CacheEvent,
    Plan,
    WorkerInfo,
    WorkerReport,
    WorkerReports,
)
from tierloom.adapters.vllm.exchange.reset_socket import ResetSocket, address
from tierloom.adapters.vllm.exchange.settings import Configured
from tierloom.adapters.vllm.worker.captures import Captures
from tierloom.adapters.vllm.worker.layout import is_draft, overwrites_early
from tierloom.adapters.vllm.worker.loads import Loading, Loads
from tierloom.adapters.vllm.worker.pipelines import GroupPipeline, open_pipelines, vllm_rank
from tierloom.adapters.vllm.worker.tickets import Tickets
from tierloom.adapters.vllm.worker.transfer_log import TransferLog
from tierloom.stages.errors import ConfigError, TierloomError
from tierloom.stages.kv.namespace import Namespace

if TYPE_CHECKING:
    from tierloom.adapters.vllm.worker.blended_loads import BlendedLoad, BlendedLoads

log = logging.getLogger("tierloom.vllm")

NAP = 0.002
"""Seconds that a step which computes nothing waits for something to end: it would only spin."""
MANY, FEW = 4096, 32
"""Events reported with a step that computes nothing, and with one that others wait for."""
COSTS = 1.0
"""Seconds between two reports of what tiers cost."""


class WorkerSide:
    """What vLLM's hooks of a worker call. Used by the worker's one thread."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, conf: Configured) -> None:
        self._vllm, self._kv, self.conf = vllm_config, kv_cache_config, conf
        self._rank = 0
        self._end_spans: Callable[[], None] = lambda: None
        self._report = WorkerReport()
        self.transfer_log = TransferLog()
        self._woken = threading.Event()
        self._tickets = Tickets(lambda _: self._woken.set())
        self._loads = Loads(self._tickets.retrieve)
        self._saves = Captures(self._tickets.store, conf.settings.hold)
        self._blends: BlendedLoads | None = None
        """Only where prompts may be blended."""
        self._plan: Plan | None = None
        """The last that was accepted."""
        self._reset_socket: ResetSocket | None = None
        self._overwrites = False
        """A step may write blocks before `handle_preemptions`, or free some that left a window."""
        self._last: list[int] = []  # the last layer of each group
        self._asked: dict[str, list[Any]] = {}
        self._bad: set[int] = set()
        self._layer: dict[str, tuple[int, int]] = {}  # a name to its group and its index there
        self._costs_at, self._many = 0.0, MANY

    @property
    def pipelines(self) -> list[GroupPipeline]:
        return self._tickets.pipelines

    @property
    def loads_layered(self) -> bool:
        """Something is being loaded layer by layer now."""
        return self._loads.layered and not self._repairs

    @property
    def saves_layered(self) -> bool:
        return self._saves.layered and not self._repairs

    @property
    def _repairs(self) -> bool:
        """The model that calls is run by us."""
        return self._blends is not None and self._blends.running

    # -- start and end ---------------------------------------------------------------------------

    def register_kv_caches(self, caches: Mapping[str, Any]) -> None:
        """Open the pipelines over the KV tensors, or log why not. Raises ConfigError."""
        rank = vllm_rank(self._vllm.parallel_config)
        self._rank, self.transfer_log = rank.index, TransferLog(rank.index, self._tickets.figures)
        try:
            self._reset_socket = ResetSocket(address(self._vllm, rank.index), self._tickets.answer)
        except OSError as error:
            log.warning("the scheduler cannot reset what this worker stores: %s", error)
        try:
            opened = open_pipelines(self._vllm, self._kv, self.conf, caches, rank)
        except Exception as error:  # no memory, no driver, no tier: vLLM can do without any of them
            if isinstance(error, ConfigError):
                raise
            known = isinstance(error, TierloomError)
            log.error("caching is off: %s", error, exc_info=not known)  # noqa: TRY400
            self._report.info = _off(str(error) or repr(error))
            return
        self._tickets.pipelines, self._report.info, model = opened
        for p in self.pipelines if self.conf.settings.http else ():
            p.pipeline.measure()
        for p in self.pipelines:
            touch_ahead(p.pipeline)
        self._end_spans = trace_requests(p.pipeline for p in self.pipelines)
        if model is not None:
            from tierloom.adapters.vllm.worker.blended_loads import BlendedLoads

            self._blends = BlendedLoads(self._vllm, self._kv, self._tickets, model)
        groups = [p.group for p in self.pipelines]
        windows = any(g.window for g in groups)
        self._overwrites = windows or overwrites_early(self._vllm, self._kv)
        self._last = [g.layout.layers - 1 for g in groups]
        self._layer = {n: (i, at) for i, g in enumerate(groups) for at, n in enumerate(g.names)}
        first = self.pipelines[0].pipeline
        log.info(
            "storing the KV of %s: pipeline %s, %s order, %s; %d layers, %d tokens per chunk",
            self.conf.settings.name or self._vllm.model_config.model, first.spec.name,
            "native" if first.native else "canonical", groups[0].backend,
            sum(g.layout.layers for g in groups), first.spec.chunk.tokens,
        )  # fmt: skip

    def shutdown(self) -> None:
        if self._reset_socket is not None:
            self._reset_socket.close()
        for p in self.pipelines:
            p.pipeline.close()
        self._end_spans()

    def unregister_kv_caches(self) -> None:
        """The engine frees its KV memory: nothing may touch it from now on."""
        self._computed()
        self._saves.read_all()
        self._loads.cancel_all()
        if self._blends is not None:
            self._blends.cancel_all()
        self._tickets.asleep = True

    def restore_kv_caches(self) -> None:
        """It is back at the same place. Raises LayoutError if it changed."""
        for p in self.pipelines:
            p.group.layout.check(p.caches)
        self._tickets.asleep = False

    # -- before the forward pass -----------------------------------------------------------------

    def handle_preemptions(self, plan: Plan) -> None:
        """Before anything of this step is written: saves whose blocks it may overwrite."""
        self._accept_plan(plan)
        self._saves.fence(plan.fenced)
        self._loads.cancel(plan.abandoned)
        if self._blends is not None:
            self._blends.cancel(plan.abandoned)
        if self._saves_by_layer:
            self._saves.begin(layered=True)

    def _accept_plan(self, plan: Plan) -> None:
        """Take over a step's plan, with the first of its hooks that brings it."""
        if plan is self._plan:
            return
        self._plan = plan
        self._computed()  # the step before: its `wait_for_save` may never have been called
        self._saves.plan(plan.saves, plan.held)

    def _computed(self) -> None:
        """What was planned before is computed, or launched: begin to save it."""
        if self._saves:
            self._saves.computed(self._last)
            if self._overwrites:
                self._saves.fence()

    def before_forward(self, plan: Plan) -> None:
        """Behind all that a step writes before its forward: where loads may begin, although some
        model runners ask for them only when the forward is launched."""
        self._tickets.after = [p.pipeline.event() for p in self.pipelines] if plan.loads else []

    def start_load_kv(self, plan: Plan) -> None:
        """Begin the plan's loads, and ask its questions."""
        self._accept_plan(plan)
        self._loads.begin(load for load in plan.loads if load.passages is None)
        if self._blends is not None:
            self._blends.begin(load for load in plan.loads if load.passages is not None)
            self._blends.run(plan.orders, self._report)
        for request, span in plan.questions.items():
            self._asked[request] = [p.pipeline.begin_lookup(span) for p in self.pipelines]
            for future in self._asked[request]:
                future.add_done_callback(lambda _: self._woken.set())

    def wait_for_layer_load(self, name: str) -> None:
        """Before a layer's attention: what is loaded for it must be in place."""
        if name in self._layer:
            self._loads.wait_layer(self._layer[name][1])

    # -- after the forward pass ------------------------------------------------------------------

    def save_kv_layer(self, name: str) -> None:
        """After a layer's attention."""
        if name in self._layer and not is_draft(name):  # drafters run after it, and repeatedly
            self._saves.layer_done(*self._layer[name])

    def wait_for_save(self, plan: Plan) -> None:
        """The step's KV is computed, or launched: begin the plan's saves."""
        self._accept_plan(plan)
        self._computed()

    @property
    def _saves_by_layer(self) -> bool:
        """Not if each half of a batch runs by itself: a layer's hook comes after the first half."""
        if not self.pipelines or getattr(self._vllm.parallel_config, "use_ubatching", False):
            return False
        return self.conf.settings.saves_by_layer(self.pipelines[0].group.layout.device)

    # -- at the end of a step --------------------------------------------------------------------

    def get_transfer_results(self, plan: Plan) -> KVConnectorTransferResults:
        """What has ended. A step that computes nothing waits a moment for more."""
        self._accept_plan(plan)
        self._many = MANY if plan.idle else FEW
        if plan.idle and (self._loads or self._asked or self._saves or self._blends):
            self._woken.wait(NAP)
        self._woken.clear()
        out = KVConnectorTransferResults()
        for loading in self._loads.ended(self._last):
            if loading.load.layered:
                self._report.loaded.append(loading.load.request)
            else:
                out.finished_recving.add(loading.load.request)
            self._loaded(loading, out)
        if self._blends is not None:
            self._blends.placed(self._report)
            for blend in self._blends.ended():
                out.finished_recving.add(blend.load.request)
                self._loaded(Loading(blend.load, blend.tickets), out, blend)
        if self._saves:
            out.finished_sending.update(self._saves.released())
            self._report.captured += self._saves.captured()
            for storing in self._saves.ended():
                self._report.ended.append(storing.save.job)
                self.transfer_log.stored(storing.save, storing.tickets)
        return out

    def _loaded(
        self, loading: Loading, out: KVConnectorTransferResults, blend: BlendedLoad | None = None
    ) -> None:
        """A load has ended: report what is missing, so that it is computed. Of a blend all is
        there, or nothing."""
        load = loading.load
        skipped = load.fresh - load.start
        if blend is None:
            placed = min((t.wait().tokens for t in loading.tickets), default=0)
            got = min(max(0, placed - skipped), load.span.wanted - skipped)
            self.transfer_log.loaded(load, loading.tickets, got)
        else:
            got = load.span.wanted - skipped if blend.done else 0
            self.transfer_log.loaded(load, loading.tickets, got, len(blend.computed) * blend.done)
            if blend.done:
                self.transfer_log.blended(blend)
        if got == load.span.wanted - skipped:
            return
        self._report.failed.append(load.request)
        if len(self.pipelines) > 1:
            out.failed_recving.add(load.request)
        else:
            group = self.pipelines[0].group
            missing = load.blocks[group.number].after(skipped + got, group.block_tokens)
            self._bad.update(b for b in missing if b > 0)  # 0: vLLM's own null block

    def get_block_ids_with_load_errors(self) -> set[int]:
        bad, self._bad = self._bad, set()
        return bad

    def build_connector_worker_meta(self) -> WorkerReports | None:
        """What the scheduler should know of this step."""
        report = self._report
        for group, p in enumerate(self.pipelines):
            changes = p.pipeline.changes(self._many)
            if self._rank:  # one of them tells what the text is
                changes = [change._replace(text=None) for change in changes]
            report.events += [CacheEvent(group, *change) for change in changes]
            report.more = report.more or p.pipeline.unseen > 0
        for request, futures in list(self._asked.items()):
            if all(f.done() for f in futures):
                del self._asked[request]
                failed = any(f.cancelled() or f.exception() for f in futures)
                report.answers[request] = 0 if failed else min(f.result() for f in futures)
        now = time.monotonic()
        if now - self._costs_at > COSTS:
            self._costs_at = now
            for p in self.pipelines[:1]:
                reads = {name: tier.reads for name, tier in p.pipeline.tiers.items()}
                report.costs = {n: (r.latency, r.per_byte) for n, r in reads.items() if r.reads}
        if not report:
            return None
        self._report = WorkerReport()
        return WorkerReports({self._rank: report})

    def report(self) -> dict[str, Any]:
        """Plain numbers, for tests and for debugging: all zero but `stats` if nothing runs."""
        every = [p.pipeline.stats() for p in self.pipelines]
        return {
            "flight": sum(s["arena"]["flight"] for s in every),
            "open": sum(g["open"] for s in every for g in s["graphs"].values()),
            "loads": len(self._loads) + len(self._blends or ()), "asked": len(self._asked),
            **self._saves.report(), "stats": every[0] if every else {},
        }  # fmt: skip


def _off(why: str) -> WorkerInfo:
    return WorkerInfo(Namespace(model="off"), "own", 1, 1, 1, 1, (), "", {}, "never", 0.0, 0, why)
