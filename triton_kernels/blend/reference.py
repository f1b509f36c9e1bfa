"""What the kernels of blending must do, in plain torch: the oracle of the tests, and slow.

Caches and frames are those of `paged_copy/reference.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tierloom.triton_kernels.paged_copy import reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tierloom.triton_kernels.blend.turns import TurnTable


def scatter_turned(
    views: Sequence[torch.Tensor],
    frame: torch.Tensor,
    layers: range,
    slots: Sequence[int],
    turn: TurnTable,
    row: int,
) -> None:
    """`reference.scatter` of a frame whose K is turned by row `row` of `turn`; -1: as it is."""
    turned = frame.clone()
    for i, layer in enumerate(layers):
        if row >= 0 and (kind := int(turn.kind[layer])) >= 0:
            cos, sin = (torch.from_numpy(a[row, kind]) for a in (turn.cos, turn.sin))
            turn_pairs(turned[0, i], cos, sin, turn.first, interleaved=turn.interleaved)
    reference.scatter(views, turned, layers, slots)


def turn_pairs(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, first: int, *, interleaved: bool
) -> None:
    """Turn `x` [..., dim] in place by `cos` and `sin` [..., half], in their dtype; x keeps its
    own."""
    pairs = x[..., first : first + 2 * cos.shape[-1]]
    a, b = (pairs[..., ::2], pairs[..., 1::2]) if interleaved else pairs.chunk(2, -1)
    u, v = a.to(cos.dtype), b.to(cos.dtype)
    new = u * cos - v * sin, v * cos + u * sin  # both before either: u may be a itself
    a.copy_(new[0])
    b.copy_(new[1])


def paid_to(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, here: torch.Tensor,
    context: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """The probe's scores [context] of `queries` [n, heads, dim] over `keys` [tokens, kv heads,
    dim], of which those are `here`, in their dtype."""
    paid = _shares(queries, keys, positions, here, scale)[..., :context].sum(2).flatten(0, 1)
    return (paid / paid.sum(1, keepdim=True).clamp(min=1e-30)).amax(0)


def attended(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor,
    here: torch.Tensor, scale: float,
) -> torch.Tensor:  # fmt: skip
    """[n, heads, dim] what `queries` get of `values` [tokens, kv heads, dim], likewise; zero where
    they see nothing."""
    share = _shares(queries, keys, positions, here, scale)
    return torch.einsum("hgqk,khd->qhgd", share, values).flatten(1, 2)


def deviation(fresh: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """[..., tokens] squared difference of [..., tokens, heads, dim], summed over heads and dim."""
    return (fresh - kept).square().sum((-2, -1))


def _shares(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, here: torch.Tensor,
    scale: float,
) -> torch.Tensor:  # fmt: skip
    """[kv heads, heads of each, n, tokens]"""
    grouped = queries.unflatten(1, (keys.shape[1], -1))
    logits = torch.einsum("qhgd,khd->hgqk", grouped, keys) * scale
    seen = here & (torch.arange(len(keys)) <= positions[:, None])
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
