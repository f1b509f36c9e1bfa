"""torch and numba: what a prompt's last tokens attend to, the twin of `probe_triton.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from tierloom.triton_kernels.blend.reference import paid_to
from tierloom.triton_kernels.blend.rows_cpu import gathered

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from tierloom.triton_kernels.memory.tables import PlaneTable


def probe_scores(
    planes: PlaneTable, layer: int, slots: npt.NDArray[np.int64], queries: torch.Tensor,
    positions: torch.Tensor, context: int, *, scale: float,
) -> torch.Tensor:  # fmt: skip
    """float32 [context]: the share of attention on the first `context` tokens that falls on each,
    summed over `queries`; maximum over heads (ProphetKV, arXiv 2602.02579, chooses by the like).

    `slots` [tokens] of the tokens at positions 0, 1, ...; -1: none is there. `queries` [<= 64,
    heads, dim], turned, in K's dtype, see the tokens up to their `positions` (int64). `scale`: of
    the logits. `layer` is K's plane. Nothing is validated or written; the result is the caller's.
    """
    one = slice(layer, layer + 1)
    keys = gathered(replace(planes, base=planes.base[one], stride=planes.stride[one], kv=1),
                    slots, queries.dtype)[0]  # fmt: skip
    here = torch.from_numpy(slots >= 0)
    return paid_to(queries.float(), keys.float(), positions, here, context, scale)
