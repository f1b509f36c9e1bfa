"""What the kernels must do, in plain torch and Python: the oracle of the tests, and slow.

A cache is given as `views`: one tensor ``[blocks, block_tokens, heads, dim]`` per plane, with
whatever strides its layout gives it (plane = kv * layers + layer). No address is computed here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def gather(
    views: Sequence[torch.Tensor], kv: int, layers: range, slots: Sequence[int], rows: int
) -> torch.Tensor:
    """A new frame ``[kv, len(layers), rows, heads, dim]``; skipped and missing rows are zero."""
    _, block_tokens, heads, dim = views[0].shape
    frame = torch.zeros(kv, len(layers), rows, heads, dim, dtype=views[0].dtype)
    for half, group in enumerate(_planes(views, kv, layers)):
        for i, view in enumerate(group):
            for row, slot in enumerate(slots):
                if slot >= 0:
                    frame[half, i, row] = view[slot // block_tokens, slot % block_tokens]
    return frame


def scatter(
    views: Sequence[torch.Tensor], frame: torch.Tensor, layers: range, slots: Sequence[int]
) -> None:
    """Place the frame's first ``len(slots)`` rows into `views`; slot -1 is left as it is."""
    block_tokens = views[0].shape[1]
    for half, group in enumerate(_planes(views, len(frame), layers)):
        for i, view in enumerate(group):
            for row, slot in enumerate(slots):
                if slot >= 0:
                    view[slot // block_tokens, slot % block_tokens] = frame[half, i, row]


def _planes(views: Sequence[torch.Tensor], kv: int, layers: range) -> list[Sequence[torch.Tensor]]:
    count = len(views) // kv
    return [[views[half * count + layer] for layer in layers] for half in range(kv)]
