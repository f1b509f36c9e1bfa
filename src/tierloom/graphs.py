"""Graphs written in Python: `Graph`, and a function for each stage that there is.

from tierloom.graphs import Graph, lookup, put, zstd
"""

from __future__ import annotations

from typing import Any

from tierloom.pipeline.graph_in_python import (
    Graph as Graph,
    Step as Step,
    as_written as as_written,
    pipeline_yaml as pipeline_yaml,
    stage_named as _stage_named,
)
from tierloom.stages import catalog as _catalog


def __getattr__(name: str) -> Any:
    try:
        return _stage_named(name)
    except KeyError:
        raise AttributeError(f"no stage is called {name!r}") from None


def __dir__() -> list[str]:
    return sorted(["Graph", "Step", "as_written", "pipeline_yaml", *_catalog.names("stage")])
