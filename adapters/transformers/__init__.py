"""`CachedModel`, a transformers model whose KV is stored. It imports no transformers."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tierloom.adapters.transformers.cached_model import CachedModel, TierloomCache

__all__ = ["CachedModel", "TierloomCache"]


def __getattr__(name: str) -> Any:
    from tierloom.adapters.transformers import cached_model

    if name == "Kept":
        warnings.warn("Kept is now called CachedModel", DeprecationWarning, stacklevel=2)
        name = "CachedModel"
    if name not in cached_model.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(cached_model, name)
