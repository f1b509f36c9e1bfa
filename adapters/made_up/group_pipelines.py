"""Pipelines over made-up KV, one for each group of layers, from whatever file a user has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tierloom.adapters.engine.pipeline_parts import own_paths
from tierloom.adapters.lmcache.convert import convert, yaml_text
from tierloom.adapters.lmcache.options import from_file
from tierloom.adapters.made_up.kv_groups import KVGroup
from tierloom.adapters.made_up.round_trip import RoundTrip
from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.config.spec import PipelineSpec
from tierloom.stages.options import masked

_OURS = {"version", "extends", "tiers", "graphs"}
"""Keys of which a pipeline file has at least one, and an LMCache file none."""


def any_config(
    config: str, overrides: Mapping[str, Any], warn: Callable[[str], None]
) -> PipelineSpec:
    """A preset, a pipeline file, or an LMCache file, which is converted; `warn` is told what of it
    has no counterpart. `overrides`: as of `tierloom.open`. Raises ConfigError, OSError."""
    path = Path(config).expanduser()
    if not path.is_file() or not ("/" in config or "." in config):
        return load_config(config, overrides)
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        tree = None  # `load_config` says where it is wrong
    if not isinstance(tree, dict) or _OURS & tree.keys():
        return load_config(config, overrides)
    given = from_file(path)
    draft = convert(given)
    made = yaml.safe_load(yaml_text(draft, given, config))
    for line in draft.missing:
        warn(f"{config}: not done: {masked(line)}")
    return load_config(made, overrides, said_in=f"{config}, converted")


@contextlib.contextmanager
def open_groups(
    spec: PipelineSpec, again: Callable[[Mapping[str, Any]], PipelineSpec],
    groups: Sequence[KVGroup], **how: Any,
) -> Iterator[list[RoundTrip]]:  # fmt: skip
    """A pipeline for each group, all closed at the end. `again`: reads the file with overrides:
    what only one process may use, such as a disk's folder, each group has for itself. `how`: more
    arguments of RoundTrip. Raises ConfigError, TierDown."""
    with contextlib.ExitStack() as stack:
        trips = []
        for i, group in enumerate(groups):
            part = f"group-{i}" if len(groups) > 1 else ""
            own = again(own_paths(spec, part)) if part else spec
            trips.append(stack.enter_context(contextlib.closing(
                RoundTrip(own, group, part=part, **how)
            )))  # fmt: skip
        yield trips
