"""Stages that do nothing, so that what is measured is the runner: `use: noop_stages:Cut`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierloom.stages.contract.batch import Piece
from tierloom.stages.contract.stage import Lane, LoopStage, Stage

if TYPE_CHECKING:
    from tierloom.stages.contract.batch import Batch
    from tierloom.stages.contract.request import Ticket


@dataclass(frozen=True, kw_only=True, slots=True)
class Nothing:
    """None."""


class Cut(LoopStage):
    """A request to chunks, whose names are all the same."""

    Options = Nothing
    takes = "tokens@host/request"
    gives = "plan@host/request"

    async def plan_async(self, ticket: Ticket) -> None:
        size = self.ctx.chunk.tokens
        ticket.pieces = [
            Piece(index=i, start=i * size, tokens=size, links=b"", parent=b"")
            for i in range(len(ticket.tokens) // size)
        ]


class Await(LoopStage):
    """A batch through a coroutine."""

    Options = Nothing
    takes = "any@any/frame"
    gives = "same@same/frame"

    async def apply_async(self, batch: Batch) -> Batch:
        return batch


class Begin(Await):
    """A plan to frames."""

    takes = "plan@host/request"
    gives = "bytes@host/frame"


class Thread(Stage):
    """A batch through a thread of the pool."""

    Options = Nothing
    takes = "any@any/frame"
    gives = "same@same/frame"
    lane = Lane.POOL

    def apply(self, batch: Batch) -> Batch:
        return batch


class End(LoopStage):
    """Counts every chunk as kept."""

    Options = Nothing
    takes = "any@any/frame"
    gives = "receipt@host/request"

    async def apply_async(self, batch: Batch) -> Batch:
        for piece in batch.live:
            piece.took.add("nowhere")
            batch.ticket.deliver("nowhere")
        return batch
