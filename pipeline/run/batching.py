"""A planned request split into batches of bounded bytes, each with memory of its own."""

from __future__ import annotations

from tierloom.stages.contract.batch import BatchResources
from tierloom.stages.contract.request import Request

BATCH_CHUNKS = 16
BATCH_BYTES = 32 << 20
"""What goes through the graph together: enough to make Python's part small, little enough that the
copies and the disk of one request overlap."""


def split_into_batches(
    request: Request, object_bytes: int, chunk_bytes: int, working: int
) -> list[BatchResources]:
    """The request's batches. `object_bytes`: of a plain object. `chunk_bytes`: what a
    chunk may need of the arena's `working` bytes.

    Waves hold all of the request's memory until the last layer. One that would need more than half
    of the arena goes without them, batch by batch; a store when the last layer is computed.
    """
    if request.layered and len(request.chunks) * chunk_bytes > working // 2:
        request.layered = False
        if request.graph == "retrieve":
            request.allowed = request.groups
    step = max(1, min(BATCH_CHUNKS, BATCH_BYTES // object_bytes, working // 4 // chunk_bytes))
    waves = request.groups if request.layered else 1
    return [
        BatchResources(request.chunks[k : k + step], waves)
        for k in range(0, len(request.chunks), step)
    ]
