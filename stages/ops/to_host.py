"""to_host, to_device: where a graph says that frames change place.

    land: {use: to_host}
    lift: {use: to_device}

The arena is page-locked and the kernels read and write it directly, so frames lie on the host as
soon as they are gathered and are placed from there: on CPU and on CUDA alike these stages pass
batches on. They stand in graphs so that a codec's place (`host`, `device`) is checked.
"""

from __future__ import annotations

from tierloom.stages.contract.batch import Batch
from tierloom.stages.contract.stage import BatchStage
from tierloom.stages.options import NoOptions


class ToHost(BatchStage):
    """Frames on the host, for host codecs and tiers."""

    Options = NoOptions
    takes = "any@device/frame"
    gives = "same@host/frame"

    async def apply(self, batch: Batch) -> None:
        pass


class ToDevice(BatchStage):
    """Frames on the device, for device codecs and scatter."""

    Options = NoOptions
    takes = "any@host/frame"
    gives = "same@device/frame"

    async def apply(self, batch: Batch) -> None:
        pass
