"""scatter: verified frames into the engine's cache.

    place: {use: scatter}

A frame is checked and placed in one go, and a bad one is never placed: its chunk and those after
it are reported, and the engine computes them.
"""

from __future__ import annotations

from tierloom.stages.contract.batch import Batch
from tierloom.stages.contract.chunks import Chunk
from tierloom.stages.contract.stage import BatchStage, UnderWay
from tierloom.stages.errors import Damaged, Lost
from tierloom.stages.kv.object import Header
from tierloom.stages.kv.paged_copy import end_scatter
from tierloom.stages.ops import frame_copy
from tierloom.stages.options import NoOptions
from tierloom.triton_kernels.memory.tables import CORRUPT, PLACED, FrameTable

Jobs = list[tuple[Chunk, Header, int, range, int]]
"""Of each chunk: its header, the address of its object, frames, and tokens."""


class Scatter(BatchStage):
    """Places the wanted rows of each frame; opens the gates of layer groups by passing."""

    Options = NoOptions
    takes = "kv@any/frame"
    gives = "receipt@host/request"
    touches_engine = True

    def apply(self, batch: Batch) -> UnderWay | None:
        begun: list[UnderWay] = []
        try:
            for trusted in (False, True):
                live = [c for c in batch.live if c.object and self._trusted(c) == trusted]
                for elsewhere in (False, True):
                    group = [c for c in live if (c.excerpt is not None) == elsewhere]
                    if group:
                        begun += self._place(batch, group, verify=not trusted, elsewhere=elsewhere)
        except BaseException:
            frame_copy.wait_for(batch.request.memory, begun)
            raise
        if not begun:
            return None

        def settle() -> None:
            for each in begun:
                each.settle()

        return UnderWay([mark for each in begun for mark in each.marks], settle)

    def _trusted(self, chunk: Chunk) -> bool:
        """Decoded frames were verified before decoding; memory is trusted when told to."""
        return chunk.plain is not None or chunk.took <= self.ctx.trusted

    def _place(
        self, batch: Batch, live: list[Chunk], *, verify: bool, elsewhere: bool
    ) -> list[UnderWay]:
        """Place chunks that all stand where they were captured, or all `elsewhere`; what of it a
        device does."""
        jobs = [
            (c, o.header, o.lease.at(0, o.header.nbytes), batch.frames_of(o.header), c.source.rows)
            for c in live
            if (o := c.plain or c.object) is not None and c.source is not None
        ]
        frames = frame_copy.frame_table(self.ctx.geometry, jobs)
        memory, device = batch.request.memory, self.ctx.device
        if elsewhere:
            from tierloom.stages.passages.placing import excerpt_rows, turn_table

            many = [len(part) for _, _, _, part, _ in jobs]
            slots = excerpt_rows(batch.request, frames, live, many)
            turn = turn_table(self.ctx, live, many)
            mark = frame_copy.scatter(memory, frames, device, verify=verify, slots=slots, turn=turn)
        else:
            mark = frame_copy.scatter(memory, frames, device, verify=verify)
        if mark is None:
            self._scattered(batch, jobs, frames)
            return []

        def settle() -> None:
            end_scatter(frames)
            self._scattered(batch, jobs, frames)

        return [UnderWay([mark], settle)]

    def _scattered(self, batch: Batch, jobs: Jobs, frames: FrameTable) -> None:
        """Say what became of each chunk."""
        if (frames.status == PLACED).all():
            for chunk, header, *_ in jobs:
                self._placed(batch, chunk, header)
            return
        at = 0
        for chunk, header, _, part, _ in jobs:
            state = frames.status[at : at + len(part)]
            at += len(part)
            if (state == CORRUPT).any():
                batch.refuse(chunk, Damaged("a frame's checksum does not match"))
            elif not (state == PLACED).all():
                batch.lose(chunk, batch.request.cancelled or Lost.CANCELLED)
            else:
                self._placed(batch, chunk, header)

    def _placed(self, batch: Batch, chunk: Chunk, header: Header) -> None:
        ours = header.group == batch.request.group
        if batch.request.done_with(chunk, batch.frames if ours else range(batch.request.groups)):
            g = self.ctx.geometry
            chunk.nbytes = g.frame_bytes(g.layers, chunk.wanted)
