"""`CachedModel`, a transformers model whose KV is stored. It imports no transformers."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tierloom.adapters.transformers.cached_model import CachedModel, TierloomCache

__all__ = ["CachedModel", "TierloomCache"]

_RENAMED = {"Kept": "CachedModel", "Request": "Generation"}
_KNOWN = {*__all__, *_RENAMED, "Abandoned", "Generation", "KVShape", "KeptLayer"}


def __getattr__(name: str) -> Any:
    if name not in _KNOWN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tierloom.adapters.transformers import cached_model

    if name in _RENAMED:
        warnings.warn(f"{name} is now {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return getattr(cached_model, _RENAMED.get(name, name))
