"""The kernels of a blend over a model's K and V: a layer's rows are pages of one token.

Triton's where tensors are on a GPU; elsewhere numba's, or whoever asks does it in torch.
"""

from __future__ import annotations

import numpy as np
import torch

from tierloom.triton_kernels.blend import reference
from tierloom.triton_kernels.blend.turns import SIZES
from tierloom.triton_kernels.memory.tables import PlaneTable

Pair = tuple[torch.Tensor, torch.Tensor]
"""K and V of a layer, `[1, heads, tokens, dim]` with any strides."""


def on_gpu(tensor: torch.Tensor) -> bool:
    """Triton's kernels take it."""
    return tensor.device.type == "cuda" and _known(tensor)


def attended(query: torch.Tensor, kept: Pair, at: torch.Tensor, scale: float) -> torch.Tensor:
    """`[1, queries, heads, dim]`: what `query` `[1, heads, queries, dim]` at positions `at` gets of
    the rows up to these."""
    from tierloom.triton_kernels.blend.attention_triton import launch_blend_attention
    from tierloom.triton_kernels.paged_copy.triton import DevicePlanes

    queries = query[0].transpose(0, 1)
    with torch.cuda.device_of(query):  # where a launch goes
        planes = DevicePlanes.of(_planes(kept), query.device)
        return launch_blend_attention(planes, 0, 1, _slots(kept), queries, at, scale=scale)[None]


def paid(
    query: torch.Tensor, kept: Pair, at: torch.Tensor, context: int, scale: float
) -> torch.Tensor | None:
    """float32 [context]: what these pay to each of the first tokens, maximum over heads. None: they
    are more than the kernel takes."""
    from tierloom.triton_kernels.blend.probe_triton import QUERIES, launch_probe_scores
    from tierloom.triton_kernels.paged_copy.triton import DevicePlanes

    if query.shape[2] > QUERIES:
        return None
    queries = query[0].transpose(0, 1)
    with torch.cuda.device_of(query):
        planes = DevicePlanes.of(_planes(kept), query.device)
        return launch_probe_scores(planes, 0, _slots(kept), queries, at, context, scale=scale)


def deviations(fresh: Pair, kept: Pair) -> torch.Tensor:
    """[2, tokens] squared difference of fresh and kept K and V, summed over heads and channels."""
    rows = torch.stack([t[0].transpose(0, 1) for t in fresh]).contiguous()
    if not _known(rows):
        return reference.deviation(rows, torch.stack([t[0].transpose(0, 1) for t in kept]))
    if on_gpu(rows):
        from tierloom.triton_kernels.blend.deviation_triton import launch_deviation
        from tierloom.triton_kernels.paged_copy.triton import DevicePlanes

        with torch.cuda.device_of(rows):
            planes = DevicePlanes.of(_planes(kept), rows.device)
            return launch_deviation(planes, _slots(kept), rows)
    from tierloom.triton_kernels.blend.deviation_cpu import deviation

    return deviation(_planes(kept), np.arange(rows.shape[1]), rows)


def _known(tensor: torch.Tensor) -> bool:
    return str(tensor.dtype).removeprefix("torch.") in SIZES


def _slots(kept: Pair) -> torch.Tensor:
    return torch.arange(kept[0].shape[2], device=kept[0].device)


def _planes(kept: Pair) -> PlaneTable:
    steps = [(t.stride(2), 0, t.stride(1), t.stride(3)) for t in kept]
    size, (_, heads, _, dim) = kept[0].itemsize, kept[0].shape
    base = np.array([t.data_ptr() for t in kept], np.int64)
    return PlaneTable(base, np.array(steps, np.int64) * size, 2, 1, heads, dim, size)
