"""What vLLM's plugin entry point and `kv_connector_module_path` name. It imports no vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tierloom.adapters.vllm.connector import TierloomConnector, register

__all__ = ["TierloomConnector", "register"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tierloom.adapters.vllm import connector

    return getattr(connector, name)
