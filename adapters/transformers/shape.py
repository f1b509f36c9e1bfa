"""The shape of a model's KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class KVShape:
    """Shape of a model's KV: `[1, heads, tokens, dim]` for K and for V of every layer."""

    layers: int
    heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device
