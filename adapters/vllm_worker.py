"""The connector in a worker: loads into vLLM's blocks, saves out of them, tells what came of it.

Nothing here waits for a tier. Loads and saves are tickets of the pipelines; each step looks which
are through. Blocks are touched only while vLLM keeps them: a load's until it is reported, a save's
until it is captured, and where vLLM is about to reuse them sooner, the save is waited for briefly
or given up.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from ..stages.errors import LayoutError, Lost
from .vllm_ledger import Ledger
from .vllm_messages import Hello, News, Plan, Seen, Told
from .vllm_pipes import Pipe, Rank, open_pipes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..stages.ticket import Ticket
    from .vllm_messages import Load, Save
    from .vllm_settings import Configured

log = logging.getLogger("tierloom.vllm")

FENCE = 0.05
"""Seconds that a step may be kept waiting until a save has read blocks that it will overwrite."""
NAP = 0.002
"""Seconds that a step which computes nothing waits for something to end: it would only spin."""
MANY, FEW = 4096, 32
"""Changes told with a step that computes nothing, and with one that others wait for."""
COSTS = 1.0
"""Seconds between two reports of what tiers cost."""


class Loading(NamedTuple):
    load: Load
    tickets: list[Ticket]


class Storing(NamedTuple):
    save: Save
    tickets: list[Ticket]


class WorkerSide:
    """What vLLM's hooks of a worker call. Used by the worker's one thread."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, conf: Configured) -> None:
        self._vllm, self._kv, self.conf = vllm_config, kv_cache_config, conf
        self.pipes: list[Pipe] = []
        self._rank = 0
        self._told = Told()
        self.ledger = Ledger(first=True)
        self._loading: dict[str, Loading] = {}
        self._layered: list[Loading] = []
        self._storing: dict[int, Storing] = {}
        self._uncaptured: dict[int, Storing] = {}
        self._behind: list[tuple[int, Ticket]] = []
        """Saves of this step that follow the model layer by layer, each with its share."""
        self._held: dict[str, float] = {}
        self._asked: dict[str, list[Any]] = {}
        self._bad: set[int] = set()
        self._layer: dict[str, tuple[int, int]] = {}
        self._woken = threading.Event()
        self._costs_at = 0.0
        self._many = MANY

    @property
    def loads_layered(self) -> bool:
        """Something is being loaded layer by layer just now."""
        return bool(self._layered)

    @property
    def saves_layered(self) -> bool:
        return bool(self._behind)

    # -- start and end ---------------------------------------------------------------------------

    def register(self, caches: Mapping[str, Any]) -> None:
        """The KV tensors are there: open what keeps them, or say why not. Raises ConfigError."""
        rank = Rank.here(self._vllm.parallel_config)
        self._rank, self.ledger = rank.index, Ledger(first=rank.index == 0)
        try:
            self.pipes, hello = open_pipes(self._vllm, self._kv, self.conf, caches, rank)
        except LayoutError as error:
            log.error("caching is off: %s", error)  # noqa: TRY400 - the message says it all
            self._told.hello = _off(str(error))
            return
        self._told.hello = hello
        self._layer = {
            name: (i, at) for i, p in enumerate(self.pipes) for at, name in enumerate(p.share.names)
        }
        pipe = self.pipes[0].pipe
        log.info(
            "keeping the KV of %s: pipeline %s, %s order, %s; %d layers, %d tokens a chunk",
            self.conf.settings.name or self._vllm.model_config.model, pipe.spec.name,
            "native" if pipe.native else "canonical", self.pipes[0].share.backend,
            sum(p.share.layout.layers for p in self.pipes), pipe.spec.chunk.tokens,
        )  # fmt: skip

    def close(self) -> None:
        for p in self.pipes:
            p.pipe.close()

    # -- before the forward pass -----------------------------------------------------------------

    def fence(self, plan: Plan) -> None:
        """Before anything of this step is written: saves whose blocks it may overwrite."""
        for job in plan.fenced:
            for ticket in self._uncaptured[job].tickets if job in self._uncaptured else ():
                ticket.captured(FENCE)
        for request in plan.abandoned:
            for ticket in self._loading[request].tickets if request in self._loading else ():
                ticket.cancel()
        for request in plan.held:
            self._held[request] = time.monotonic() + self.conf.settings.hold
        if plan.clear:
            for p in self.pipes:
                p.pipe.clear(wait=False)
        if self._saves_by_layer and plan.saves:
            self._begin_saves(plan.saves)

    def load(self, plan: Plan) -> None:
        """Set out to load what the plan says, and to ask what it asks."""
        for load in plan.loads:
            made = Loading(load, self._tickets("load", self._retrieve, load))
            if load.layered:
                self._layered.append(made)
            else:
                self._loading[load.request] = made
        for request, span in plan.questions.items():
            self._asked[request] = [p.pipe.begin_lookup(span) for p in self.pipes]
            for future in self._asked[request]:
                future.add_done_callback(self._wake)

    def wait_layer(self, name: str) -> None:
        """Before a layer's attention: what is loaded for it must be there."""
        if self._layered and name in self._layer:
            layer = self._layer[name][1]
            for ticket in (t for loading in self._layered for t in loading.tickets):
                ticket.wait_layer(layer)

    # -- behind the forward pass -----------------------------------------------------------------

    def layer_done(self, name: str) -> None:
        """Behind a layer's attention."""
        if self._behind and name in self._layer:
            share, layer = self._layer[name]
            for whose, ticket in self._behind:
                if whose == share:
                    ticket.layer_done(layer)

    def save(self, plan: Plan) -> None:
        """The step's KV is computed, or launched: set out to save what the plan says."""
        if self._behind:  # whatever graphs or shortcuts kept from us: all layers are done now
            for share, ticket in self._behind:
                ticket.layer_done(self.pipes[share].share.layout.layers - 1)
            self._behind = []
        elif plan.saves:
            self._begin_saves(plan.saves)
        if any(p.share.window for p in self.pipes):
            for save in plan.saves:  # blocks behind the window go back at the next step
                for ticket in self._storing[save.job].tickets:
                    ticket.captured(FENCE)

    @property
    def _saves_by_layer(self) -> bool:
        settings = self.conf.settings
        return bool(self.pipes) and settings.saves_by_layer(self.pipes[0].share.layout.device)

    def _begin_saves(self, saves: list[Save]) -> None:
        layered = self._saves_by_layer
        for save in saves:
            tickets = self._tickets("save", self._store, save)
            self._storing[save.job] = self._uncaptured[save.job] = Storing(save, tickets)
            if layered:
                self._behind += enumerate(tickets)

    def _tickets(self, what: str, begin: Callable[[Pipe, Any], Ticket], job: Any) -> list[Ticket]:
        """A ticket of each pipeline; none at all where one cannot be had: the job has failed."""
        tickets: list[Ticket] = []
        try:
            for p in self.pipes:
                ticket = begin(p, job)
                ticket.future.add_done_callback(self._wake)
                tickets.append(ticket)
        except Exception:
            log.exception("request %s: cannot %s", job.request, what)
            for ticket in tickets:
                ticket.cancel()
            return []
        return tickets

    def _store(self, p: Pipe, save: Save) -> Ticket:
        begin = p.pipe.begin_store if self._saves_by_layer else p.pipe.store
        return begin(save.span, p.caches, blocks=p.blocks(save.blocks[p.share.group]))

    def _retrieve(self, p: Pipe, load: Load) -> Ticket:
        begin = p.pipe.begin_retrieve if load.layered else p.pipe.retrieve
        blocks = p.blocks(load.blocks[p.share.group])
        return begin(load.span, p.caches, blocks=blocks, deadline=load.seconds)

    def _wake(self, _: Any) -> None:
        self._woken.set()

    # -- at the end of a step --------------------------------------------------------------------

    def results(self, plan: Plan) -> KVConnectorTransferResults:
        """What has ended. A step that computes nothing waits a moment for more."""
        self._many = MANY if plan.idle else FEW
        if plan.idle and (self._loading or self._asked or self._storing or self._held):
            self._woken.wait(NAP)
        self._woken.clear()
        out = KVConnectorTransferResults()
        for loading in self._layered:
            self._told.loaded.append(loading.load.request)
            self._loaded(loading, out)
        self._layered = []
        for request, loading in list(self._loading.items()):
            if all(t.future.done() for t in loading.tickets):
                del self._loading[request]
                out.finished_recving.add(request)
                self._loaded(loading, out)
        self._sweep()
        now = time.monotonic()
        for request, until in list(self._held.items()):
            mine = [s for s in self._uncaptured.values() if s.save.request == request]
            if mine and now > until:
                for ticket in (t for s in mine for t in s.tickets):
                    ticket.cancel(Lost.LATE)
                mine = []
            if not mine:
                del self._held[request]
                out.finished_sending.add(request)
        return out

    def _sweep(self) -> None:
        """Saves that have let go of their blocks, and those that are through."""
        for job, storing in list(self._uncaptured.items()):
            if all(t.is_captured or t.cancelled is not None for t in storing.tickets):
                del self._uncaptured[job]
                self._told.captured.append(job)
        for job, storing in list(self._storing.items()):
            if job not in self._uncaptured and all(t.future.done() for t in storing.tickets):
                del self._storing[job]
                self._told.ended.append(job)
                self.ledger.stored(storing.save, storing.tickets)

    def _loaded(self, loading: Loading, out: KVConnectorTransferResults) -> None:
        """A load is through: report what is missing, so that it is computed."""
        load = loading.load
        skipped = load.fresh - load.start
        placed = min((t.wait().tokens for t in loading.tickets), default=0)
        got = min(max(0, placed - skipped), load.span.place - skipped)
        self.ledger.loaded(load, loading.tickets, got)
        if got == load.span.place - skipped:
            return
        self._told.failed.append(load.request)
        if len(self.pipes) > 1:
            out.failed_recving.add(load.request)
        else:
            share = self.pipes[0].share
            first = (skipped + got) // share.block_tokens
            self._bad.update(b for b in load.blocks[share.group][first:] if b >= 0)

    def bad_blocks(self) -> set[int]:
        bad, self._bad = self._bad, set()
        return bad

    def news(self) -> News | None:
        """What the scheduler should know of this step."""
        for share, p in enumerate(self.pipes):
            changes = p.pipe.changes(self._many)
            self._told.seen += [Seen(share, *change) for change in changes]
            self._told.more = self._told.more or p.pipe.unseen > 0
        for request, futures in list(self._asked.items()):
            if all(f.done() for f in futures):
                del self._asked[request]
                failed = any(f.cancelled() or f.exception() for f in futures)
                self._told.answers[request] = 0 if failed else min(f.result() for f in futures)
        now = time.monotonic()
        if now - self._costs_at > COSTS:
            self._costs_at = now
            for p in self.pipes[:1]:
                reads = {name: tier.reads for name, tier in p.pipe.tiers.items()}
                self._told.costs = {n: (r.latency, r.per_byte) for n, r in reads.items() if r.reads}
        if not self._told:
            return None
        told, self._told = self._told, Told()
        return News({self._rank: told})

    def report(self) -> dict[str, Any]:
        """Plain numbers, for tests and for the curious: all zero but `stats` when nothing runs."""
        every = [p.pipe.stats() for p in self.pipes]
        return {
            "flight": sum(s["arena"]["flight"] for s in every),
            "open": sum(g["open"] for s in every for g in s["graphs"].values()),
            "loads": len(self._loading) + len(self._layered), "stores": len(self._storing),
            "held": len(self._held), "asked": len(self._asked),
            "stats": every[0] if every else {},
        }  # fmt: skip


def _off(why: str) -> Hello:
    from ..stages.namespace import Namespace

    return Hello(Namespace(model="off"), 1, 1, 1, 1, (), "", {}, "never", 0.0, 0, why)
