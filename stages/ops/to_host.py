"""to_host, to_device: where a graph says that frames change place.

    land: {use: to_host}
    lift: {use: to_device}

The arena is page-locked and the kernels read and write it directly, so frames lie on the host as
soon as they are gathered and are placed from there: on CPU and on CUDA alike these stages pass
batches on. They stand in graphs so that a codec's place (`host`, `device`) is checked.
"""

from __future__ import annotations

from dataclasses import dataclass

from tierloom.stages.contract.batch import Batch
from tierloom.stages.contract.stage import LoopStage


@dataclass(frozen=True, kw_only=True, slots=True)
class MoveOptions:
    """None."""


class ToHost(LoopStage):
    """Frames on the host, for host codecs and tiers."""

    Options = MoveOptions
    takes = "any@device/frame"
    gives = "same@host/frame"

    async def apply_async(self, batch: Batch) -> Batch:
        return batch


class ToDevice(LoopStage):
    """Frames on the device, for device codecs and scatter."""

    Options = MoveOptions
    takes = "any@host/frame"
    gives = "same@device/frame"

    async def apply_async(self, batch: Batch) -> Batch:
        return batch
