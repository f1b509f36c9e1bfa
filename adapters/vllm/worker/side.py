"""The connector in a worker: loads into vLLM's blocks, saves out of them, tells what came of it.

Nothing here waits for a tier. Loads and saves are tickets of the pipelines; each step looks which
are through. Blocks are touched only while vLLM keeps them: a load's until it is reported, a save's
until it is captured, and where vLLM is about to reuse them sooner, the save is waited for briefly
or given up.

Model runners call the hooks of a step in different orders, and some leave one out: with a draft
model, what has ended is asked before `wait_for_save`, which a pipeline stage that is not the last
never calls. So every hook that brings the plan lets it be taken down first (`_heed`), and nothing
depends on which hook that was.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from tierloom.adapters.vllm.exchange.messages import Hello, Load, News, Plan, Save, Seen, Told
from tierloom.adapters.vllm.exchange.reset_socket import Door, address
from tierloom.adapters.vllm.exchange.settings import Configured
from tierloom.adapters.vllm.worker.captures import Captures
from tierloom.adapters.vllm.worker.layout import is_draft, overwrites_early
from tierloom.adapters.vllm.worker.pipelines import Pipe, Rank, open_pipes
from tierloom.adapters.vllm.worker.transfer_log import Ledger
from tierloom.stages.contract.ticket import Ticket
from tierloom.stages.errors import ConfigError, TierDown, TierloomError

log = logging.getLogger("tierloom.vllm")

NAP = 0.002
"""Seconds that a step which computes nothing waits for something to end: it would only spin."""
MANY, FEW = 4096, 32
"""Changes told with a step that computes nothing, and with one that others wait for."""
COSTS = 1.0
"""Seconds between two reports of what tiers cost."""


class Loading(NamedTuple):
    load: Load
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
        self._saves = Captures(self._store, conf.settings.hold)
        self._plan: Plan | None = None
        """The last that was taken down."""
        self._door: Door | None = None
        self._epoch, self._epoch_lock = 0, threading.Lock()
        """Resets so far; what was planned before the last is not saved."""
        self._asleep = False
        """The engine has given its KV memory back."""
        self._overwrites = False
        """A step may write blocks before its fence, or gives back some that lie behind a window."""
        self._last: list[int] = []  # the last layer of each share
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
        return self._saves.layered

    # -- start and end ---------------------------------------------------------------------------

    def register(self, caches: Mapping[str, Any]) -> None:
        """The KV tensors are there: open what keeps them, or say why not. Raises ConfigError."""
        rank = Rank.here(self._vllm.parallel_config)
        self._rank, self.ledger = rank.index, Ledger(first=rank.index == 0)
        try:
            self._door = Door(address(self._vllm, rank.index), self._answer)
        except OSError as error:
            log.warning("the scheduler cannot reset what this worker keeps: %s", error)
        try:
            self.pipes, hello = open_pipes(self._vllm, self._kv, self.conf, caches, rank)
        except ConfigError:
            raise
        except Exception as error:  # no memory, no driver, no tier: vLLM can do without any of them
            known = isinstance(error, TierloomError)
            log.error("caching is off: %s", error, exc_info=not known)  # noqa: TRY400
            self._told.hello = _off(str(error) or repr(error))
            return
        self._told.hello = hello
        windows = any(p.share.window for p in self.pipes)
        self._overwrites = windows or overwrites_early(self._vllm, self._kv)
        self._last = [p.share.layout.layers - 1 for p in self.pipes]
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
        if self._door is not None:
            self._door.close()
        for p in self.pipes:
            p.pipe.close()

    def sleep(self) -> None:
        """The engine gives its KV memory back: nothing may touch it from now on."""
        self._computed()
        self._saves.fence()
        for loading in (*self._loading.values(), *self._layered):
            for ticket in loading.tickets:
                ticket.cancel()
        self._asleep = True

    def wake(self) -> None:
        """It is there again, at the same place. Raises LayoutError where it is not as it was."""
        for p in self.pipes:
            p.share.layout.check(p.caches)
        self._asleep = False

    def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """A question at the door; another thread's."""
        with self._epoch_lock:
            self._epoch = int(question["reset"])
        said = [_cleared(p, local=bool(question["local"])) for p in self.pipes]
        return {"objects": sum(n for n, _ in said), "refused": [why for _, why in said if why]}

    # -- before the forward pass -----------------------------------------------------------------

    def fence(self, plan: Plan) -> None:
        """Before anything of this step is written: saves whose blocks it may overwrite."""
        self._heed(plan)
        self._saves.fence(plan.fenced)
        for request in plan.abandoned:
            for ticket in self._loading[request].tickets if request in self._loading else ():
                ticket.cancel()
        if self._saves_by_layer:
            self._saves.begin(layered=True)

    def _heed(self, plan: Plan) -> None:
        """Take a step's plan down, with the first of its hooks that brings it."""
        if plan is self._plan:
            return
        self._plan = plan
        self._computed()  # the step before: its `save` may never have come
        self._saves.plan(plan.saves, plan.held)

    def _computed(self) -> None:
        """What was planned before is computed, or launched: set out to save it."""
        if self._saves:
            self._saves.computed(self._last)
            if self._overwrites:
                self._saves.fence()

    def load(self, plan: Plan) -> None:
        """Set out to load what the plan says, and to ask what it asks."""
        self._heed(plan)
        for load in plan.loads:
            made = Loading(load, self._retrieve(load))
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
        if name in self._layer and not is_draft(name):  # drafters run behind it, and repeatedly
            self._saves.layer_done(*self._layer[name])

    def save(self, plan: Plan) -> None:
        """The step's KV is computed, or launched: set out to save what the plan says."""
        self._heed(plan)
        self._computed()

    @property
    def _saves_by_layer(self) -> bool:
        """Not where each half of a batch runs by itself: a layer's hook comes behind the first."""
        if not self.pipes or getattr(self._vllm.parallel_config, "use_ubatching", False):
            return False
        return self.conf.settings.saves_by_layer(self.pipes[0].share.layout.device)

    def _store(self, save: Save, layered: bool) -> list[Ticket]:
        def begin(p: Pipe) -> Ticket:
            store = p.pipe.begin_store if layered else p.pipe.store
            return store(save.span, p.caches, blocks=p.blocks(save.blocks[p.share.group]))

        with self._epoch_lock:  # behind a reset, nothing may set out that was planned before it
            return self._tickets("save", begin, save) if save.epoch >= self._epoch else []

    def _retrieve(self, load: Load) -> list[Ticket]:
        def begin(p: Pipe) -> Ticket:
            retrieve = p.pipe.begin_retrieve if load.layered else p.pipe.retrieve
            blocks = p.blocks(load.blocks[p.share.group])
            return retrieve(load.span, p.caches, blocks=blocks, deadline=load.seconds)

        return self._tickets("load", begin, load)

    def _tickets(self, what: str, begin: Callable[[Pipe], Ticket], job: Any) -> list[Ticket]:
        """A ticket of each pipeline; none at all where one cannot be had: the job has failed."""
        tickets: list[Ticket] = []
        if self._asleep:
            return tickets
        try:
            for p in self.pipes:
                ticket = begin(p)
                ticket.future.add_done_callback(self._wake)
                tickets.append(ticket)
        except Exception:
            log.exception("request %s: cannot %s", job.request, what)
            for ticket in tickets:
                ticket.cancel()
            return []
        return tickets

    def _wake(self, _: Any) -> None:
        self._woken.set()

    # -- at the end of a step --------------------------------------------------------------------

    def results(self, plan: Plan) -> KVConnectorTransferResults:
        """What has ended. A step that computes nothing waits a moment for more."""
        self._heed(plan)
        self._many = MANY if plan.idle else FEW
        if plan.idle and (self._loading or self._asked or self._saves):
            self._woken.wait(NAP)
        self._woken.clear()
        out = KVConnectorTransferResults()
        for loading in self._layered:
            for p, ticket in zip(self.pipes, loading.tickets, strict=False):
                ticket.wait_layer(p.share.layout.layers - 1)  # a drafter may be yet to ask
            self._told.loaded.append(loading.load.request)
            self._loaded(loading, out)
        self._layered = []
        for request, loading in list(self._loading.items()):
            if all(t.future.done() for t in loading.tickets):
                del self._loading[request]
                out.finished_recving.add(request)
                self._loaded(loading, out)
        if self._saves:
            out.finished_sending.update(self._saves.released())
            self._told.captured += self._saves.captured()
            for storing in self._saves.ended():
                self._told.ended.append(storing.save.job)
                self.ledger.stored(storing.save, storing.tickets)
        return out

    def _loaded(self, loading: Loading, out: KVConnectorTransferResults) -> None:
        """A load is through: report what is missing, so that it is computed."""
        load = loading.load
        skipped = load.fresh - load.start
        placed = min((t.wait().tokens for t in loading.tickets), default=0)
        got = min(max(0, placed - skipped), load.span.wanted - skipped)
        self.ledger.loaded(load, loading.tickets, got)
        if got == load.span.wanted - skipped:
            return
        self._told.failed.append(load.request)
        if len(self.pipes) > 1:
            out.failed_recving.add(load.request)
        else:
            share = self.pipes[0].share
            missing = load.blocks[share.group].after(skipped + got, share.block_tokens)
            self._bad.update(b for b in missing if b > 0)  # 0: vLLM's own, for what is not there

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
            "loads": len(self._loading) + len(self._layered), "asked": len(self._asked),
            **self._saves.report(), "stats": every[0] if every else {},
        }  # fmt: skip


def _off(why: str) -> Hello:
    from tierloom.stages.kv.namespace import Namespace

    return Hello(Namespace(model="off"), 1, 1, 1, 1, (), "", {}, "never", 0.0, 0, why)


def _cleared(p: Pipe, *, local: bool) -> tuple[int, str]:
    """How many objects a pipeline forgot, and what it could not."""
    try:
        return p.pipe.clear(local=local), ""
    except TierDown as error:
        return 0, str(error)
