"""Loads with passages in a worker: placed like any load, then repaired as the scheduler orders.

Whatever goes wrong in one of them is told, and the request is computed by vLLM as if nothing had
been found. Its blocks are vLLM's again when its ticket has ended and no order for it can come.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tierloom.adapters.vllm.exchange.messages import (
    Load,
    Order,
    Passages,
    Placed,
    Stretches,
    WorkerReport,
)
from tierloom.adapters.vllm.repair.engine_model import EngineModel
from tierloom.adapters.vllm.repair.forward import Repair, cut, together
from tierloom.adapters.vllm.repair.probe import probe
from tierloom.adapters.vllm.repair.proofs import prove, read_rotation
from tierloom.adapters.vllm.worker.tickets import Tickets
from tierloom.stages.contract.ticket import Ticket

log = logging.getLogger("tierloom.vllm")


@dataclass(slots=True)
class BlendedLoad:
    """A load with passages, in one worker."""

    load: Load
    passages: Passages
    tickets: list[Ticket]
    placing: bool = False
    """It was begun; without a ticket, in vain."""
    told: bool = False
    broken: bool = False
    """A repair went wrong. It still does what all ranks are ordered to, or others would wait."""
    computed: set[int] = field(default_factory=set)
    """Tokens that were, each named once."""
    seconds: float = 0.0
    """Spent in repairs."""
    done: bool = False
    """It is in place, and repaired."""


class BlendedLoads:
    """Used by the worker's one thread."""

    def __init__(
        self, vllm_config: Any, kv_cache_config: Any, tickets: Tickets, model: EngineModel
    ) -> None:
        self._configs, self._tickets, self.model = (vllm_config, kv_cache_config), tickets, model
        self._repair: Repair | None = None
        self.running = False
        """The model runs for a repair: hooks that it calls are not vLLM's own forward."""
        self._blends: dict[str, BlendedLoad] = {}
        self._ended: list[BlendedLoad] = []

    def __len__(self) -> int:
        return len(self._blends) + len(self._ended)

    def begin(self, loads: Iterable[Load]) -> None:
        for load in loads:
            assert load.passages is not None
            made = self._blends[load.request] = BlendedLoad(load, load.passages, [])
            if not load.passages.waits:
                self._place(made)

    def cancel(self, requests: Iterable[str]) -> None:
        """These requests are gone: their blocks are free when this returns."""
        for request in requests:
            if (blending := self._blends.get(request)) is not None:
                self._end(blending, done=False)

    def cancel_all(self) -> None:
        self.cancel(list(self._blends))

    def run(self, orders: Sequence[Order], report: WorkerReport) -> None:
        """What the scheduler orders in this step. All ranks run the same, or their model hangs."""
        for order in orders:
            blending = self._blends.get(order.request)
            if blending is None:  # it was canceled
                if order.what == "prove":  # others wait for the answer
                    report.proved = "the request in whose blocks they were to be is gone"
                continue
            self.running, began = True, time.perf_counter()
            try:
                self._run(order, blending, report)
            except Exception as error:
                log.exception("request %s: %s", order.request, order.what)
                if order.what == "prove":
                    report.proved = f"the proofs went wrong: {error!r}"
                else:
                    report.broken[order.request] = repr(error)
                    blending.broken = True
            finally:
                self.running = False
                if order.stretches:
                    blending.seconds += time.perf_counter() - began

    def placed(self, report: WorkerReport) -> None:
        """Tell of those whose passages have come to their blocks, or were lost."""
        for request, blending in self._blends.items():
            if (
                blending.placing
                and not blending.told
                and all(ticket.future.done() for ticket in blending.tickets)
            ):
                self._tell(request, blending, report, None)

    def ended(self) -> list[BlendedLoad]:
        """Loads that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def _run(self, order: Order, blending: BlendedLoad, report: WorkerReport) -> None:
        if order.what == "prove":
            report.proved = self._prove(blending)
        elif order.what == "place":
            self._place(blending)
        elif order.what in {"end", "fail"}:
            self._end(blending, done=order.what == "end" and not blending.broken)
        else:
            self._compute(order, blending, report)

    def _prove(self, blending: BlendedLoad) -> str:
        fresh = blending.load.fresh // self._tickets.pipelines[0].group.block_tokens
        rotation = together(lambda: read_rotation(self.model.rotary))
        return prove(together(self._made), blending.passages.blocks[fresh:], rotation) or ""

    def _made(self) -> Repair:
        if self._repair is None:
            group = self._tickets.pipelines[0].group
            self._repair = Repair(self.model, *self._configs, group)
        return self._repair

    def _place(self, blending: BlendedLoad) -> None:
        blending.tickets = self._tickets.retrieve(blending.load)
        blending.placing = True

    def _compute(self, order: Order, blending: BlendedLoad, report: WorkerReport) -> None:
        repair, blocks = together(self._made), blending.passages.blocks
        ids = np.frombuffer(blending.passages.ids, np.int32)
        blending.computed.update(i for s in order.stretches for i in range(*s))
        if order.what == "probe":
            scores = probe(repair, order.stretches[0], blocks, ids)  # type: ignore[arg-type]
            self._tell(order.request, blending, report, scores[blending.load.start :])
            return
        for part in cut(order.stretches, repair.tokens, repair.sequences):
            repair.forward(part, blocks, ids)  # type: ignore[arg-type]

    def _tell(self, request: str, blending: BlendedLoad, report: WorkerReport, scores: Any) -> None:
        """What this worker wants computed: all, where nothing can be told of the load."""
        blending.told, start = True, blending.load.start
        every = [(start, len(blending.passages.ids) // 4)]
        told = Placed(every, every, probe=False)
        try:
            for ticket in blending.tickets:
                # Exact rows that did not come are computed, whatever text was found in their place.
                exact = start + ticket.wait().tokens, start + blending.load.span.tokens
                told = Placed(
                    [exact, *_moved(ticket.compute(scores), start)],
                    [exact, *_moved(ticket.missing(), start)], ticket.needs == "scores",
                )  # fmt: skip
        except Exception:
            log.exception("request %s: all of it is computed", request)
        report.placed[request] = told

    def _end(self, blending: BlendedLoad, *, done: bool) -> None:
        for ticket in blending.tickets:
            ticket.cancel()  # nothing, where it is done
            if done:
                ticket.repaired(blending.seconds)
        del self._blends[blending.load.request]
        blending.done = done
        self._ended.append(blending)


def _moved(given: Stretches, by: int) -> Stretches:
    return [(a + by, b + by) for a, b in given]
