"""numba: how far fresh rows lie from those in a cache, the twin of `deviation_triton.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from tierloom.triton_kernels.blend.cpu import BITS
from tierloom.triton_kernels.blend.rows_cpu import gathered
from tierloom.triton_kernels.memory.floats import to_float
from tierloom.triton_kernels.memory.machine_code import compiled

if TYPE_CHECKING:
    import numpy.typing as npt

    from tierloom.triton_kernels.memory.tables import PlaneTable


def deviation(
    planes: PlaneTable, slots: npt.NDArray[np.int64], fresh: torch.Tensor
) -> torch.Tensor:
    """float32 [planes, tokens]: the squared difference of `fresh` [planes, tokens, heads, dim] and
    what `planes` hold in `slots` [tokens], summed over heads and channels in float32 (Yao et al.,
    "CacheBlend", arXiv 2405.16444); 0 where a slot is -1.

    `fresh` is contiguous, in the cache's dtype (KeyError where that is none of `BITS`). Nothing
    else is validated, nothing is written; the result is the caller's.
    """
    bits = BITS[str(fresh.dtype).removeprefix("torch.")]
    found = torch.zeros(fresh.shape[:2])
    kept = gathered(planes, slots, fresh.dtype)
    words = torch.int16 if fresh.itemsize == 2 else torch.int32
    one, other = (t.view(words).flatten(2).numpy().view(bits) for t in (fresh, kept))
    _sum(one, other, slots, found.numpy())
    return found


@compiled(nogil=True, fastmath={"reassoc"})
def _sum(fresh, kept, slots, found):
    for p in range(len(fresh)):
        for t in range(len(slots)):
            if slots[t] < 0:
                continue
            total = np.float32(0)
            for i in range(fresh.shape[2]):
                off = to_float(fresh[p, t, i]) - to_float(kept[p, t, i])
                total += off * off
            found[p, t] = total
