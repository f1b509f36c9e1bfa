"""Loads in a worker: within a step, ahead of the model layer by layer, or between steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from tierloom.adapters.vllm.exchange.messages import Load
from tierloom.stages.contract.ticket import Ticket


class Loading(NamedTuple):
    """A load that was begun, and its ticket in each pipeline; none: it could not be."""

    load: Load
    tickets: list[Ticket]


class Loads:
    """Used by the worker's one thread."""

    def __init__(self, begin: Callable[[Load], list[Ticket]]) -> None:
        self._begin = begin
        self._loading: dict[str, Loading] = {}
        self._layered: list[Loading] = []

    def __len__(self) -> int:
        return len(self._loading) + len(self._layered)

    @property
    def layered(self) -> bool:
        """Something is being loaded layer by layer now."""
        return bool(self._layered)

    def begin(self, loads: Iterable[Load]) -> None:
        for load in loads:
            made = Loading(load, self._begin(load))
            if load.layered:
                self._layered.append(made)
            else:
                self._loading[load.request] = made

    def cancel(self, requests: Iterable[str]) -> None:
        """Cancel loads between steps, of these requests."""
        for request in requests:
            for ticket in self._loading[request].tickets if request in self._loading else ():
                ticket.cancel()

    def cancel_all(self) -> None:
        for loading in (*self._loading.values(), *self._layered):
            for ticket in loading.tickets:
                ticket.cancel()

    def wait_layer(self, layer: int) -> None:
        """Wait until a layer of all that is loaded within the step is in place."""
        for ticket in (t for loading in self._layered for t in loading.tickets):
            ticket.wait_layer(layer)

    def ended(self, last: Sequence[int]) -> Iterator[Loading]:
        """Loads that have ended since the last call; those within the step are waited for. `last`:
        the last layer of each group."""
        layered, self._layered = self._layered, []
        for loading in layered:
            for layer, ticket in zip(last, loading.tickets, strict=False):
                ticket.wait_layer(layer)  # a drafter may have yet to ask for it
            yield loading
        for request, loading in list(self._loading.items()):
            if all(t.future.done() for t in loading.tickets):
                del self._loading[request]
                yield loading
