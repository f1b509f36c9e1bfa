"""Loads with passages in a worker: placed like any load, then repaired as the scheduler orders.

Whatever goes wrong in one of them is told, and the request is computed by vLLM as if nothing had
been found. Its blocks are vLLM's again when its ticket has ended and no order for it can come.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
from tierloom.adapters.vllm.repair.forward import Repair, cut
from tierloom.adapters.vllm.repair.probe import probe
from tierloom.adapters.vllm.repair.proofs import prove, read_rotation
from tierloom.adapters.vllm.worker.loads import Loading
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
    computed: int = 0
    seconds: float = 0.0
    """Spent in repairs."""


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
        self._ended: list[tuple[Loading, int]] = []

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
                self._end(blending, got=0)

    def cancel_all(self) -> None:
        self.cancel(list(self._blends))

    def run(self, orders: Sequence[Order], report: WorkerReport) -> None:
        """What the scheduler orders in this step. All ranks run the same, or their model hangs."""
        for order in orders:
            blending = self._blends.get(order.request)
            if blending is None:  # it went wrong here
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
                    self._end(blending, got=0)
            finally:
                self.running = False
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

    def ended(self) -> list[tuple[Loading, int]]:
        """Loads that have ended since the last call, and tokens from the span's first on that are
        in place."""
        ended, self._ended = self._ended, []
        return ended

    def _run(self, order: Order, blending: BlendedLoad, report: WorkerReport) -> None:
        if order.what == "prove":
            report.proved = self._prove(blending)
        elif order.what == "place":
            self._place(blending)
        elif order.what == "fail":
            self._end(blending, got=0)
        elif order.what == "end":
            self._end(blending, got=blending.load.span.wanted)
        else:
            self._compute(order, blending, report)

    def _prove(self, blending: BlendedLoad) -> str:
        fresh = blending.load.fresh // self._tickets.pipelines[0].group.block_tokens
        rotation = read_rotation(self.model.rotary)
        why = prove(self._made(), blending.passages.blocks[fresh:], rotation)
        return why or ""

    def _made(self) -> Repair:
        if self._repair is None:
            group = self._tickets.pipelines[0].group
            self._repair = Repair(self.model, *self._configs, group)
        return self._repair

    def _place(self, blending: BlendedLoad) -> None:
        blending.tickets = self._tickets.retrieve(blending.load)
        blending.placing = True

    def _compute(self, order: Order, blending: BlendedLoad, report: WorkerReport) -> None:
        repair, blocks = self._made(), blending.passages.blocks
        ids = np.frombuffer(blending.passages.ids, np.int32)
        blending.computed += sum(b - a for a, b in order.stretches)
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

    def _end(self, blending: BlendedLoad, got: int) -> None:
        load, tickets = blending.load, blending.tickets
        for ticket in tickets:
            ticket.cancel()  # nothing, where it is done
        del self._blends[load.request]
        self._ended.append((Loading(load, tickets), got))
        if got and tickets:
            receipt = tickets[0].wait()
            log.info(
                "request %s: %d tokens exact, %d blended, %d computed in %.4f s",
                load.request, load.start + receipt.tokens, receipt.blended, blending.computed,
                blending.seconds,
            )  # fmt: skip


def _moved(given: Stretches, by: int) -> Stretches:
    return [(a + by, b + by) for a, b in given]
