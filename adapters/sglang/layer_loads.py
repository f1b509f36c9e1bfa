"""Loads of a batch of requests, whose layers the model waits for one by one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tierloom.adapters.sglang.page_store import PageStore
from tierloom.stages.contract.ticket import Ticket
from tierloom.stages.kv.block_table import BlockTable
from tierloom.stages.kv.object import Object
from tierloom.stages.kv.prefix import Span

log = logging.getLogger("tierloom.sglang")

_PATIENCE = 60.0
"""Seconds for a layer that lies in memory: SGLang ends a request whose load fails."""


class PageLoad:
    """One request's pages, held in memory from the promise until they are placed."""

    def __init__(
        self, store: PageStore, span: Span, numbers: list[int], held: dict[bytes, Object]
    ) -> None:
        """`numbers`: pages of the device pool. `held`: from `Pipeline.hold`; released here."""
        self._store, self._span, self._numbers, self._held = store, span, numbers, held
        self._ticket: Ticket | None = None

    def start(self) -> None:
        """Begin to copy. Never raises."""
        try:
            self._ticket = self._store.pipeline.begin_retrieve(
                self._span, self._store.pages.caches, blocks=BlockTable(self._numbers),
                held=self._held, deadline=_PATIENCE,
            )  # fmt: skip
        except Exception:
            log.exception("a load could not be started; SGLang will end its request")

    def wait_layer(self, layer: int) -> None:
        if self._ticket is not None:
            self._ticket.wait_layer(layer)

    def finish(self) -> bool:
        """Wait until nothing touches the device's pages any more; whether all of them came."""
        if self._ticket is None:
            self.release()
            return False
        came = self._ticket.wait().tokens == self._span.tokens
        self._ticket.future.add_done_callback(lambda _: self.release())  # a canceled one may go on
        return came

    def release(self) -> None:
        """Let the objects go. Once."""
        while self._held:
            self._held.popitem()[1].lease.release()


class LayerLoads:
    """What SGLang's pools wait at (its `layer_done_counter`): batches by index, layers of the one
    that runs by number. Used by the scheduler's thread and by the one that runs the model."""

    def __init__(self) -> None:
        self._batches: dict[int, Sequence[PageLoad]] = {}
        self._last = self._running = -1

    def begin(self, loads: Sequence[PageLoad]) -> int:
        """Loads that have started, as a batch; its index."""
        self._last += 1
        self._batches[self._last] = loads
        return self._last

    def set_consumer(self, index: int) -> None:
        """The model runs the batch of this index; -1: one without loads."""
        self._running = index

    def wait_until(self, threshold: int) -> None:
        """Wait until layer `threshold` of the running batch is in place, or is known not to come:
        `finish` tells."""
        for load in self._batches.get(self._running, ()):
            load.wait_layer(threshold)

    def finish(self, index: int) -> bool:
        """Wait for the end of a batch; whether all of it came."""
        came = [load.finish() for load in self._batches.pop(index, ())]
        return all(came)

    def reset(self) -> None:
        """End all batches. Indexes go on: none is given twice."""
        for index in list(self._batches):
            self.finish(index)
        self._running = -1
