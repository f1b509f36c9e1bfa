"""tierloom stores the KV cache of large language models, and reuses it when a text comes again.

    import tierloom

    layout = tierloom.KVLayout.from_tensors(caches, order="NHD")
    with tierloom.open("tiered", layout=layout, model="my-model") as pipe:
        pipe.store(tokens, caches, slots).wait()
        pipe.retrieve(tokens, caches, slots).wait()

To try it without an engine: `pipe = tierloom.play()`, which has made-up KV of its own.

Importing this imports neither torch nor numba; the first `open` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tierloom import codecs, graphs
    from tierloom.adapters.door.http_door import serve_http
    from tierloom.pipeline.config.presets import presets
    from tierloom.pipeline.graph_in_python import Graph
    from tierloom.pipeline.pipeline import Pipeline
    from tierloom.pipeline.pipeline_admin import administer
    from tierloom.pipeline.playing import play
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
    "Graph": "pipeline.graph_in_python",
    "KVLayout": "stages.kv.layout",
    "Pipeline": "pipeline.pipeline",
    "Receipt": "stages.contract.request",
    "Ticket": "stages.contract.ticket",
    "administer": "pipeline.pipeline_admin",
    "serve_http": "adapters.door.http_door",
    "play": "pipeline.playing",
    "presets": "pipeline.config.presets",
}
"""Where a name of `__all__` is, unless it is an error."""

__all__ = [
    "ArenaFull",
    "BadObject",
    "BlockTable",
    "Closed",
    "ConfigError",
    "Graph",
    "InputError",
    "KVLayout",
    "LayoutError",
    "Lost",
    "Pipeline",
    "Receipt",
    "Ticket",
    "TierDown",
    "TierloomError",
    "administer",
    "codecs",
    "graphs",
    "open",
    "play",
    "presets",
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
    shared across different ones; more keywords are those of `Pipeline`. Raises TypeError for an
    unknown one, ConfigError with every problem of the configuration, and
    LayoutError if host memory cannot be page-locked for the GPU that the caches are on.
    """
    from tierloom.pipeline.config.load import load_config
    from tierloom.pipeline.pipeline import Pipeline
    from tierloom.pipeline.requests import check_keywords

    check_keywords("open", identity, Pipeline.__init__)
    return Pipeline(load_config(config, overrides), layout, model=model, **identity)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tierloom' has no attribute {name!r}")
    if name in ("codecs", "graphs"):
        return import_module(f"tierloom.{name}")
    return getattr(import_module(f"tierloom.{_HOME.get(name, 'stages.errors')}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
