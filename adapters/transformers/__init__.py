"""`Kept`, a transformers model whose KV is kept. It imports no transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tierloom.adapters.transformers.cached_model import Kept

__all__ = ["Kept"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tierloom.adapters.transformers import cached_model

    return getattr(cached_model, name)
