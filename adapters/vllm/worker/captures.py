"""Saves in a worker: which are due, which still read the engine's blocks, which have ended.

A save goes through four states: *due* (planned, its KV not computed yet), *reading* (its tickets
are in flight, blocks are being read), *captured* (its blocks are free) and *ended* (stored, or
lost). A step's plan is accepted before anything else is done in it, so a request's blocks are held
from then on, whichever of its hooks a model runner calls first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from tierloom.adapters.vllm.exchange.messages import Save
from tierloom.stages.contract.ticket import Ticket
from tierloom.stages.errors import Lost

LEAVE = 5.0
"""Seconds that an engine which frees its KV memory waits for saves that read it."""
FENCE = 0.05
"""Seconds that a step may wait until a save has read blocks that the step will overwrite."""


class Storing(NamedTuple):
    """A save that has begun, and its ticket in each pipeline."""

    save: Save
    tickets: list[Ticket]


class Captures:
    """Used by the worker's one thread."""

    def __init__(self, begin: Callable[[Save, bool], list[Ticket]], block_hold_s: float) -> None:
        """`begin`: begin a save, layer by layer or not; no tickets if it cannot. `block_hold_s`:
        seconds that a finished request's blocks may be kept until they are read."""
        self._begin, self._block_hold_s = begin, block_hold_s
        self._due: dict[int, Save] = {}
        self._reading: dict[int, Storing] = {}
        self._storing: dict[int, Storing] = {}
        """All that have begun and not ended, those that are reading among them."""
        self._following: list[tuple[int, Ticket]] = []
        """Those of this step that follow the model layer by layer, each with its group."""
        self._held: dict[str, float] = {}
        """Finished requests whose blocks are kept, and until when."""

    def __bool__(self) -> bool:
        return bool(self._due or self._storing or self._held)

    @property
    def layered(self) -> bool:
        """Some follow the model layer by layer now."""
        return bool(self._following)

    def report(self) -> dict[str, int]:
        """For tests and for debugging: all zero if nothing runs."""
        return {"stores": len(self._due) + len(self._storing), "held": len(self._held)}

    def plan(self, saves: Iterable[Save], held: Iterable[str]) -> None:
        """Note what a step will save, and whose blocks are kept for it."""
        for save in saves:
            self._due[save.job] = save
        for request in held:
            self._held[request] = time.monotonic() + self._block_hold_s

    def begin(self, *, layered: bool = False) -> None:
        """Begin what is due: it is computed, or launched; or, `layered`, it will be."""
        due, self._due = self._due, {}
        for save in due.values():
            tickets = self._begin(save, layered)
            self._storing[save.job] = self._reading[save.job] = Storing(save, tickets)
            if layered:
                self._following += enumerate(tickets)

    def layer_done(self, group: int, layer: int) -> None:
        """A layer of a group is computed."""
        for whose, ticket in self._following:
            if whose == group:
                ticket.layer_done(layer)

    def computed(self, last: Sequence[int]) -> None:
        """All layers of the step are computed, even those whose hooks a CUDA graph left out.
        `last`: the last layer of each group."""
        if self._following:
            following, self._following = self._following, []
            for group, ticket in following:
                ticket.layer_done(last[group])
        if self._due:
            self.begin()

    def fence(self, jobs: Iterable[int] | None = None) -> None:
        """The blocks of these (None: of all) may be overwritten by what is launched from now on."""
        for job in list(self._reading) if jobs is None else jobs:
            for ticket in self._reading[job].tickets if job in self._reading else ():
                ticket.fence(FENCE)

    def read_all(self) -> None:
        """No block is read any more when this returns."""
        for storing in self._reading.values():
            for ticket in storing.tickets:
                ticket.captured(LEAVE)

    def captured(self) -> list[int]:
        """Jobs that have read their blocks since the last call."""
        done = [j for j, s in self._reading.items() if all(t.is_captured for t in s.tickets)]
        for job in done:
            del self._reading[job]
        return done

    def ended(self) -> list[Storing]:
        """Those that have ended since the last call; all of them were reported as captured."""
        done = [
            s for j, s in self._storing.items()
            if j not in self._reading and all(t.future.done() for t in s.tickets)
        ]  # fmt: skip
        for storing in done:
            del self._storing[storing.save.job]
        return done

    def released(self) -> set[str]:
        """Held requests whose blocks no save reads anymore; saves that took too long are canceled.

        A request with a save that is due is not among them: it will read them.
        """
        out: set[str] = set()
        due = {save.request for save in self._due.values()}
        now = time.monotonic()
        for request, until in self._held.items():
            mine = [s for s in self._reading.values() if s.save.request == request]
            if mine and now > until:
                for ticket in (t for s in mine for t in s.tickets):
                    ticket.cancel(Lost.LATE)
                mine = []
            if not mine and request not in due:
                out.add(request)
        for request in out:
            del self._held[request]
        return out
