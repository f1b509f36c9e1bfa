"""A planned request cut into batches of bounded bytes, each with memory of its own."""

from __future__ import annotations

from tierloom.stages.contract.batch import Scope
from tierloom.stages.contract.request import Ticket

BATCH_CHUNKS = 16
BATCH_BYTES = 32 << 20
"""What goes through the graph together: enough to make Python's part small, little enough that the
copies and the disk of one request overlap."""


def cut(ticket: Ticket, piece_bytes: int, working: int) -> list[Scope]:
    """The request's batches. `piece_bytes`: what a chunk may need of the arena's `working` bytes.

    Waves hold all of the request's memory until the last layer. One that would need more than half
    of the arena goes without them, batch by batch; a store when the last layer is computed.
    """
    if ticket.layered and len(ticket.pieces) * piece_bytes > working // 2:
        ticket.layered = False
        if ticket.graph == "retrieve":
            ticket.allowed = ticket.groups
    step = max(1, min(BATCH_CHUNKS, BATCH_BYTES // piece_bytes, working // 4 // piece_bytes))
    scopes = [Scope(ticket.pieces[k : k + step]) for k in range(0, len(ticket.pieces), step)]
    for scope in scopes:
        scope.open = ticket.groups if ticket.layered else 1
    return scopes
