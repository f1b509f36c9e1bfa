"""Codecs named in one word, in commands and notebooks: `cachegen:default`, `int4+zstd`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

import yaml

from tierloom.pipeline.config.problems import nearest
from tierloom.stages import catalog
from tierloom.stages.contract.stage import Stage
from tierloom.stages.errors import ConfigError

NONE = "none"
"""No codec: KV as it is, the noise floor."""


class ChainStep(NamedTuple):
    """One stage of a chain, as YAML has it."""

    use: str
    options: dict[str, Any]


def parse_codec(text: str) -> list[ChainStep]:
    """`int4`, `zstd:level=3`, `cachegen:default`, chains `a+b`; `none` is an empty chain.

    Options are `name=value`, separated by commas; a value alone is the codec's first option. Raises
    ConfigError for an unknown codec; the pipeline's checker checks the options.
    """
    return [] if text == NONE else [_codec(part) for part in text.split("+")]


def codecs() -> list[str]:
    """Names of the stages that encode: frames in, bytes out. Encryption does not affect quality."""
    names = catalog.names("stage").keys() - {c.name for c in catalog.CODECS.values() if c.encrypts}
    return sorted(n for n in names if _encodes(catalog.load_class("stage", n)))


def _encodes(cls: type[Any]) -> bool:
    fits = issubclass(cls, Stage) and cls.takes in ("any@host/frame", "kv@host/frame")
    return fits and cls.gives == "bytes@host/frame"


def _codec(text: str) -> ChainStep:
    use, _, rest = text.partition(":")
    if use not in (known := codecs()):
        hint = nearest(use, [NONE, *known])
        raise ConfigError(f"codec {text}: unknown codec {use!r}: {hint}")
    first = next((f.name for f in fields(catalog.load_class("stage", use).Options)), "")
    options = {}
    for entry in filter(None, rest.split(",")):
        name, given, value = entry.partition("=")
        if not given and not first:
            raise ConfigError(f"codec {text}: {use} has no options: leave out {entry!r}")
        options[name if given else first] = yaml.safe_load(value if given else entry)
    return ChainStep(use, options)
