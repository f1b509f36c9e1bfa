"""Begins the saves and loads of a worker, each in all of its pipelines, and none once reset."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from tierloom.adapters.vllm.exchange.messages import Load, Save
from tierloom.adapters.vllm.worker.pipelines import GroupPipeline
from tierloom.stages.contract.ticket import Ticket
from tierloom.stages.errors import TierDown

log = logging.getLogger("tierloom.vllm")


class Tickets:
    """Used by the worker's one thread, but for `answer`."""

    def __init__(self, ended: Callable[[Any], None]) -> None:
        """`ended`: called with each future that is done, in any thread."""
        self._ended = ended
        self.pipelines: list[GroupPipeline] = []
        self.after: list[Any] = []
        """Of each pipeline an event behind which this step's loads may begin; empty: they begin
        behind what is launched by then."""
        self.asleep = False
        """The engine has freed its KV memory: nothing begins."""
        self._epoch, self._epoch_lock = 0, threading.Lock()
        """Cache resets so far; what was planned before the last is not saved."""

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """A question at the reset socket, in another thread."""
        if "figures" in question:
            return self.figures()
        if "order" in question:
            from tierloom.pipeline.pipeline_admin import ordered_of

            pipes = {str(p.group.number): p.pipeline for p in self.pipelines}
            return ordered_of(pipes, *(question[name] for name in ("order", "said", "id")))
        return self._reset(question)

    def figures(self) -> dict[str, Any]:
        """Of each group."""
        return {str(p.group.number): p.pipeline.stats() for p in self.pipelines}

    def _reset(self, question: dict[str, Any]) -> dict[str, Any]:
        with self._epoch_lock:
            self._epoch = int(question["reset"])
        said = [_cleared(p, local=bool(question["local"])) for p in self.pipelines]
        return {"objects": sum(n for n, _ in said), "refused": [why for _, why in said if why]}

    def store(self, save: Save, layered: bool) -> list[Ticket]:
        def begin(p: GroupPipeline) -> Ticket:
            store = p.pipeline.begin_store if layered else p.pipeline.store
            return store(
                save.span, p.caches, blocks=p.blocks(save.blocks[p.group.number]),
                ids=np.frombuffer(save.ids, np.int32), exact=save.exact, trace=save.trace,
            )  # fmt: skip

        with self._epoch_lock:  # after a reset, nothing may begin that was planned before it
            return self._begin("save", begin, save) if save.epoch >= self._epoch else []

    def retrieve(self, load: Load) -> list[Ticket]:
        def begin(p: GroupPipeline) -> Ticket:
            retrieve = p.pipeline.begin_retrieve if load.layered else p.pipeline.retrieve
            blocks = p.blocks(load.blocks[p.group.number])
            more: dict[str, Any] = {}
            if load.passages is not None:
                ids = np.frombuffer(load.passages.ids, np.int32)[load.start :]
                more = {"ids": ids, "blend": load.passages.runs}
            if self.after:
                more["after"] = self.after[p.group.number]
            return retrieve(
                load.span, p.caches, blocks=blocks, deadline=load.seconds, trace=load.trace, **more
            )

        return self._begin("load", begin, load)

    def _begin(
        self, what: str, begin: Callable[[GroupPipeline], Ticket], job: Load | Save
    ) -> list[Ticket]:
        """A ticket of each pipeline; none at all if one cannot be made: the job has failed."""
        tickets: list[Ticket] = []
        if self.asleep:
            return tickets
        try:
            for p in self.pipelines:
                ticket = begin(p)
                ticket.future.add_done_callback(self._ended)
                tickets.append(ticket)
        except Exception:
            log.exception("request %s: cannot %s", job.request, what)
            for ticket in tickets:
                ticket.cancel()
            return []
        return tickets


def _cleared(p: GroupPipeline, *, local: bool) -> tuple[int, str]:
    """How many objects a pipeline deleted, and what it could not."""
    try:
        return p.pipeline.clear(local=local), ""
    except TierDown as error:
        return 0, str(error)
