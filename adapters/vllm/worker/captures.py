"""Saves in a worker: which are due, which still read the engine's blocks, which are through.

A save goes through four states: *due* (planned, its KV not computed yet), *reading* (its tickets
are out, blocks are being read), *captured* (its blocks are free) and *ended* (kept, or lost). What
is planned is taken down before anything else is done in a step, so a request's blocks are held from
then on, whichever of its hooks a model runner calls first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from tierloom.adapters.vllm.exchange.messages import Save
from tierloom.stages.contract.ticket import Ticket
from tierloom.stages.errors import Lost

FENCE = 0.05
"""Seconds that a step may be kept waiting until a save has read blocks that it will overwrite."""


class Storing(NamedTuple):
    """A save that has set out, and its ticket in each pipeline."""

    save: Save
    tickets: list[Ticket]


class Captures:
    """Used by the worker's one thread."""

    def __init__(self, begin: Callable[[Save, bool], list[Ticket]], hold: float) -> None:
        """`begin`: set a save out, layer by layer or not; no tickets where it cannot be. `hold`:
        seconds that a finished request's blocks may be kept until they are read."""
        self._begin, self._hold = begin, hold
        self._due: dict[int, Save] = {}
        self._reading: dict[int, Storing] = {}
        self._storing: dict[int, Storing] = {}
        """All that have set out and not ended: those that are reading are among them."""
        self._behind: list[tuple[int, Ticket]] = []
        """Those of this step that follow the model layer by layer, each with its share."""
        self._held: dict[str, float] = {}
        """Finished requests whose blocks are kept, and until when."""

    def __bool__(self) -> bool:
        return bool(self._due or self._storing or self._held)

    @property
    def layered(self) -> bool:
        """Some follow the model just now."""
        return bool(self._behind)

    def report(self) -> dict[str, int]:
        """For tests and for the curious: all zero when nothing runs."""
        return {"stores": len(self._due) + len(self._storing), "held": len(self._held)}

    def plan(self, saves: Iterable[Save], held: Iterable[str]) -> None:
        """Take down what a step will save, and whose blocks are kept for it."""
        for save in saves:
            self._due[save.job] = save
        for request in held:
            self._held[request] = time.monotonic() + self._hold

    def begin(self, *, layered: bool = False) -> None:
        """Set out what is due: it is computed, or launched; or, `layered`, it will be."""
        due, self._due = self._due, {}
        for save in due.values():
            tickets = self._begin(save, layered)
            self._storing[save.job] = self._reading[save.job] = Storing(save, tickets)
            if layered:
                self._behind += enumerate(tickets)

    def layer_done(self, share: int, layer: int) -> None:
        """A layer of a share is computed."""
        for whose, ticket in self._behind:
            if whose == share:
                ticket.layer_done(layer)

    def computed(self, last: Sequence[int]) -> None:
        """All layers of the step are, whatever graphs or shortcuts kept from us; `last`: the last
        layer of each share."""
        if self._behind:
            behind, self._behind = self._behind, []
            for share, ticket in behind:
                ticket.layer_done(last[share])
        if self._due:
            self.begin()

    def fence(self, jobs: Iterable[int] | None = None) -> None:
        """The blocks of these (None: of all) may be overwritten from now on."""
        for job in list(self._reading) if jobs is None else jobs:
            for ticket in self._reading[job].tickets if job in self._reading else ():
                ticket.captured(FENCE)

    def captured(self) -> list[int]:
        """Jobs that have let go of their blocks since the last call."""
        done = [j for j, s in self._reading.items() if all(t.is_captured for t in s.tickets)]
        for job in done:
            del self._reading[job]
        return done

    def ended(self) -> list[Storing]:
        """Those that are through since the last call; all of them were told as captured."""
        done = [
            s for j, s in self._storing.items()
            if j not in self._reading and all(t.future.done() for t in s.tickets)
        ]  # fmt: skip
        for storing in done:
            del self._storing[storing.save.job]
        return done

    def released(self) -> set[str]:
        """Held requests whose blocks nobody reads any more; those that took too long are given up.

        One of which a save is due is not among them: it will read them.
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
