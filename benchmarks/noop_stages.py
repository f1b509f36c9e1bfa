"""Stages that do nothing, so that what is measured is the runner: `use: noop_stages:Cut`."""

from __future__ import annotations

from tierloom.stages.contract.batch import Batch
from tierloom.stages.contract.chunks import Chunk
from tierloom.stages.contract.request import Request
from tierloom.stages.contract.stage import BatchStage, RequestStage
from tierloom.stages.options import NoOptions


class Cut(RequestStage):
    """A request to chunks, whose names are all the same."""

    Options = NoOptions
    takes = "tokens@host/request"
    gives = "plan@host/request"

    async def plan(self, request: Request) -> None:
        size = self.ctx.chunk.tokens
        request.chunks = [
            Chunk(index=i, start=i * size, tokens=size, links=b"", parent=b"")
            for i in range(len(request.tokens) // size)
        ]


class Await(BatchStage):
    """A batch through a coroutine."""

    Options = NoOptions
    takes = "any@any/frame"
    gives = "same@same/frame"

    async def apply(self, batch: Batch) -> None:
        pass


class Begin(Await):
    """A plan to frames."""

    takes = "plan@host/request"
    gives = "bytes@host/frame"


class Thread(BatchStage):
    """A batch through a thread of the pool."""

    Options = NoOptions
    takes = "any@any/frame"
    gives = "same@same/frame"

    def apply(self, batch: Batch) -> None:
        pass


class End(Await):
    """Counts every chunk as kept."""

    gives = "receipt@host/request"

    async def apply(self, batch: Batch) -> None:
        for chunk in batch.live:
            chunk.took.add("nowhere")
            batch.request.deliver("nowhere")
