"""What callers hand in, checked before any memory is touched."""

from __future__ import annotations

from typing import Any

import numpy as np

from tierloom.stages.errors import InputError


def tokens_array(tokens: Any) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Token ids as a contiguous int32 array. Raises InputError naming what is wrong."""
    raw = tokens.detach().cpu().numpy() if hasattr(tokens, "detach") else np.asarray(tokens)
    if raw.ndim != 1:
        raise InputError(f"tokens must be 1-D, got shape {raw.shape}")
    if raw.size == 0:
        return np.empty(0, np.int32)
    if raw.dtype.kind not in "iu":
        raise InputError(f"tokens must be integers, got {raw.dtype}")
    if raw.dtype != np.int32 and (int(raw.min()) < -(2**31) or int(raw.max()) >= 2**31):
        raise InputError("token ids must fit in 32 bits")
    return np.ascontiguousarray(raw, dtype=np.int32)
