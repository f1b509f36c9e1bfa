"""What a user sets in an engine's own configuration: options of the adapter and of the pipeline, in
one mapping.

    {"tierloom.config": "tiered", "tierloom.wait": "100 ms", "tiers.warm.path": "/data/kv"}

Keys that begin with `tierloom.` are the fields of the adapter's settings; every other key is the
dotted path of one value of the pipeline's configuration. A mapping inside a mapping means the same
as dots.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tierloom.pipeline.config.coerce import fill
from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.config.problems import Findings, Place
from tierloom.pipeline.config.spec import PipelineSpec
from tierloom.pipeline.config.yaml_tree import Table, dotted, from_python

NAME = "tierloom"
PREFIX = f"{NAME}."

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class ExtraConfig(Generic[S]):
    """What such a mapping means."""

    settings: S
    source: Any
    """A preset's name, a path, or a mapping: for `tierloom.open`."""
    where: str
    """What the engine calls the mapping."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Later ones win."""

    def pipeline(self, overrides: Mapping[str, Any] | None = None) -> PipelineSpec:
        """The pipeline, by `overrides` or those that the user gave. Raises ConfigError."""
        return load_config(
            self.source, self.overrides if overrides is None else overrides, said_in=self.where
        )


def read_extra_config(extra: Mapping[str, Any], cls: type[S], where: str) -> ExtraConfig[S]:
    """Read a mapping that the engine calls `where`. Raises ConfigError with every problem of our
    own keys; `ExtraConfig.pipeline` tells those of the others."""
    found, at = Findings(), Place(where)
    for path in set_twice(extra):
        found.add(at, path, "is set twice", "once with dots, and once in a mapping")
    try:
        own = own_options(extra)
    except ValueError as error:
        found.add(at, "", str(error))
        own = {}
    source = own.pop("config", None) or os.environ.get("TIERLOOM_CONFIG") or "tiered"
    tree = from_python(own, at, "", found)
    settings = fill(cls, tree, NAME, found) if isinstance(tree, Table) else None
    found.raise_all()
    assert settings is not None
    others = {k: v for k, v in extra.items() if k != NAME and not k.startswith(PREFIX)}
    return ExtraConfig(settings, source, where, others)


def own_options(said: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of tierloom itself: `tierloom.key`, and what a mapping `tierloom` holds.
    Raises ValueError."""
    nested = said.get(NAME, {})
    if not isinstance(nested, Mapping):
        raise ValueError(f"{NAME} wants a mapping, got {nested!r}")  # noqa: TRY004 (as the others)
    return {**nested} | {k.removeprefix(PREFIX): v for k, v in said.items() if k.startswith(PREFIX)}


def set_twice(said: Mapping[str, Any]) -> list[str]:
    """Dotted paths of what is set in both ways."""
    return [path for path, times in Counter(_paths(said, "")).items() if times > 1]


def _paths(value: Any, path: str) -> Iterator[str]:
    """The dotted path of each value, however it was written."""
    if not isinstance(value, Mapping) or not value:
        yield path
        return
    for key, inner in value.items():
        yield from _paths(inner, dotted(path, str(key)))
