"""tierloom stores the KV cache of large language models, and reuses it when a text comes again.

    import tierloom

    layout = tierloom.KVLayout.from_tensors(caches, order="NHD")
    with tierloom.open("tiered", layout=layout, model="my-model") as pipe:
        pipe.store(tokens, caches, slots).wait()
        pipe.retrieve(tokens, caches, slots).wait()

Importing this imports neither torch nor numba; the first `open` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tierloom.adapters.door.http_door import serve_http
    from tierloom.pipeline.pipeline import Pipeline
    from tierloom.stages.contract.request import Receipt
    from tierloom.stages.contract.ticket import Ticket
    from tierloom.stages.errors import (
        ArenaFull,
        BadObject,
        Closed,
        ConfigError,
        InputError,
        LayoutError,
        Lost,
        TierDown,
        TierloomError,
    )
    from tierloom.stages.kv.block_table import BlockTable
    from tierloom.stages.kv.layout import KVLayout

__version__ = "0.1.0"

_HOME = {
    "BlockTable": "stages.kv.block_table",
    "KVLayout": "stages.kv.layout",
    "Pipeline": "pipeline.pipeline",
    "Receipt": "stages.contract.request",
    "Ticket": "stages.contract.ticket",
    "serve_http": "adapters.door.http_door",
}
"""Where a name of `__all__` is, unless it is an error."""

__all__ = [
    "ArenaFull",
    "BadObject",
    "BlockTable",
    "Closed",
    "ConfigError",
    "InputError",
    "KVLayout",
    "LayoutError",
    "Lost",
    "Pipeline",
    "Receipt",
    "Ticket",
    "TierDown",
    "TierloomError",
    "open",
    "serve_http",
]


def open(
    config: str | Path | Mapping[str, Any],
    *,
    layout: KVLayout,
    model: str,
    overrides: Mapping[str, Any] | None = None,
    **identity: Any,
) -> Pipeline:
    """Open a pipeline: a preset's name, a YAML file or a mapping, for caches laid out as `layout`.

    `overrides` replaces single values by their path, `{"tiers.warm.path": "/data/kv"}`. `model`,
    and if known `weights=`, `rope=`, `layers=` and `heads=`, identify the KV: nothing is
    shared across different ones. Raises ConfigError with every problem of the configuration, and
    LayoutError if host memory cannot be page-locked for the GPU that the caches are on.
    """
    from tierloom.pipeline.config.load import load_config
    from tierloom.pipeline.pipeline import Pipeline

    return Pipeline(load_config(config, overrides), layout, model=model, **identity)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tierloom' has no attribute {name!r}")
    return getattr(import_module(f"tierloom.{_HOME.get(name, 'stages.errors')}"), name)
