"""The one registry: names in YAML to classes, imported only when a graph uses them.

A third party adds a stage or tier with an entry point in the group `tierloom.stages` or
`tierloom.tiers`, or names it in place as `module:Class`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal

Kind = Literal["stage", "tier"]

STAGES = {
    "aesgcm": "tierloom.stages.codecs.aesgcm:AesGcm",
    "cachegen": "tierloom.stages.codecs.cachegen:CacheGen",
    "decode": "tierloom.stages.decode:Decode",
    "fp8": "tierloom.stages.codecs.fp8:Fp8",
    "gather": "tierloom.stages.gather:Gather",
    "get": "tierloom.stages.get:Get",
    "hash": "tierloom.stages.hash:Hash",
    "int4": "tierloom.stages.codecs.int4:Int4",
    "int8": "tierloom.stages.codecs.int8:Int8",
    "lookup": "tierloom.stages.lookup:Lookup",
    "lz4": "tierloom.stages.codecs.lz4:Lz4",
    "progressive": "tierloom.stages.codecs.progressive:Progressive",
    "put": "tierloom.stages.put:Put",
    "rans": "tierloom.stages.codecs.rans:Rans",
    "scatter": "tierloom.stages.scatter:Scatter",
    "to_device": "tierloom.stages.move:ToDevice",
    "to_host": "tierloom.stages.move:ToHost",
    "turboquant": "tierloom.stages.codecs.turboquant:TurboQuant",
    "zstd": "tierloom.stages.codecs.zstd:Zstd",
}

TIERS = {
    "audit": "tierloom.stages.tiers.audit:Audit",
    "blackhole": "tierloom.stages.tiers.blackhole:Blackhole",
    "disk": "tierloom.stages.tiers.disk:Disk",
    "files": "tierloom.stages.tiers.files:Files",
    "flaky": "tierloom.stages.tiers.faults:Flaky",
    "full": "tierloom.stages.tiers.faults:Full",
    "gds": "tierloom.stages.tiers.gds:Gds",
    "infinistore": "tierloom.stages.tiers.infinistore:Infinistore",
    "memory": "tierloom.stages.tiers.memory:Memory",
    "mock": "tierloom.stages.tiers.mock:Mock",
    "mooncake": "tierloom.stages.tiers.mooncake:Mooncake",
    "nixl": "tierloom.stages.tiers.nixl:Nixl",
    "redis": "tierloom.stages.tiers.redis:Redis",
    "s3": "tierloom.stages.tiers.s3:S3",
    "server": "tierloom.stages.tiers.server:Server",
    "slow": "tierloom.stages.tiers.faults:Slow",
    "stuck": "tierloom.stages.tiers.faults:Stuck",
}

SCHEMES = {
    "az": "s3",
    "file": "files",
    "fs": "files",
    "gs": "s3",
    "infinistore": "infinistore",
    "mooncake": "mooncake",
    "mooncakestore": "mooncake",
    "redis": "redis",
    "redis-cluster": "redis",
    "redis-sentinel": "redis",
    "rediss": "redis",
    "rediss-cluster": "redis",
    "rediss-sentinel": "redis",
    "s3": "s3",
    "tierloom": "server",
    "tierloom+tls": "server",
    "tierloom+unix": "server",
    "unix": "redis",
}
"""Tiers that a URL names by its scheme; a third party's scheme is the name of its entry point."""


def names(kind: Kind) -> dict[str, str]:
    """Every known name and where its class is, entry points included; ours cannot be replaced."""
    return _added(kind) | (STAGES if kind == "stage" else TIERS)


@cache
def _added(kind: Kind) -> dict[str, str]:
    """Entry points. Read once: it takes longer than all else that opening a pipeline does."""
    return {e.name: e.value for e in entry_points(group=f"tierloom.{kind}s")}


def schemes() -> dict[str, str]:
    """Every URL scheme and the name of its tier, entry points included."""
    return {name: name for name in names("tier").keys() - TIERS.keys()} | SCHEMES


def load(kind: Kind, name: str) -> type[Any]:
    """The class behind `name` or `module:Class`. Raises KeyError (unknown) or ImportError."""
    target = name if ":" in name else names(kind)[name]
    module, _, attribute = target.partition(":")
    found: type[Any] = getattr(import_module(module), attribute)
    return found
