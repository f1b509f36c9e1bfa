"""SGLang's device pools on the CPU, small."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sizes import DIM, HEADS, LATENT, LAYERS, PAGE, ROPE, SLOTS


def device_pool(
    kind: str, *, dtype: Any = None, layers: int = LAYERS, slots: int = SLOTS, page: int = PAGE
) -> Any:
    """An empty device pool of `kind` (mha, mla) on the CPU."""
    dtype = dtype or torch.float32
    if kind == "mha":
        return MHATokenToKVPool(slots, page, dtype, HEADS, DIM, layers, "cpu", False)
    return MLATokenToKVPool(slots, page, dtype, LATENT, ROPE, layers, "cpu", False)
