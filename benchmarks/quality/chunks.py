"""An arm that is only arithmetic: each chunk by itself, bytes as its rule says."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from tierloom.adapters.quality.subject import Treated

if TYPE_CHECKING:
    from collections.abc import Callable


class Made(NamedTuple):
    """What a rule makes of a chunk."""

    kv: torch.Tensor
    """float32 `[2, layers, tokens, heads, dim]`."""
    nbytes: float
    """Of its container: payload, tables, scales. No container adds a header here."""


class Chunked:
    """Applies `rule` to float32 chunks of `chunk` tokens; what it gives is rounded to bf16."""

    def __init__(self, name: str, rule: Callable[[torch.Tensor], Made], chunk: int = 256) -> None:
        self.name, self.rule, self.chunk = name, rule, chunk

    def treat(self, ids: torch.Tensor, kv: torch.Tensor) -> Treated:
        made = [self.rule(part.float()) for part in kv.split(self.chunk, dim=2)]
        nbytes = round(sum(m.nbytes for m in made))
        return Treated(torch.cat([m.kv for m in made], dim=2).bfloat16(), nbytes, nbytes)


def in_groups(x: torch.Tensor, dim: int, group: int) -> torch.Tensor:
    """`dim` split into `[..., groups, group, ...]`; a last group that is short is filled with its
    own last element, which changes no minimum or maximum."""
    short = -x.shape[dim] % group
    if short:
        last = x.narrow(dim, x.shape[dim] - 1, 1)
        x = torch.cat([x, last.expand(*[short if i == dim else -1 for i in range(x.dim())])], dim)
    return x.unflatten(dim, (-1, group))


def uniform(x: torch.Tensor, bits: int, dim: int, group: int) -> tuple[torch.Tensor, float]:
    """Asymmetric uniform quantizer over groups along `dim`: minimum and step, fp16 each.

    Returns what comes back, and its bytes.
    """
    dim %= x.dim()
    grouped = in_groups(x, dim, group)
    low = grouped.amin(dim + 1, keepdim=True).half().float()
    step = ((grouped.amax(dim + 1, keepdim=True) - low) / (2**bits - 1)).half().float()
    step = step.clamp_min(2.0**-24)  # a group of equal values
    codes = ((grouped - low) / step).round().clamp(0, 2**bits - 1)
    back = (codes * step + low).flatten(dim, dim + 1).narrow(dim, 0, x.shape[dim])
    return back, x.numel() * bits / 8 + low.numel() * 4
