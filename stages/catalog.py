"""The one registry: names in YAML to classes, imported only when a graph uses them.

A third party adds a stage or tier with an entry point in the group `tierloom.stages` or
`tierloom.tiers`, or names it in place as `module:Class`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import resolve_name
from typing import Any, Literal, NamedTuple

Kind = Literal["stage", "tier"]


class Codec(NamedTuple):
    """One line of the registry."""

    id: int
    """What a frame's header calls it. Part of the format, never given to another codec."""
    name: str
    module: str
    """Where it is; one of ours is written relative to `tierloom.stages.codecs`."""
    decoder: str
    """Its function that undoes a frame."""
    stage: str = ""
    """Its class, which a graph names by `name`; none for what only other codecs use."""
    encrypts: bool = False
    """It keeps content secret, and does not make it smaller."""
    describe: str = ""
    """Its function `(data, codecs, scan) -> str`: what `inspect` can say of a frame."""

    @property
    def full_module(self) -> str:
        return resolve_name(self.module, "tierloom.stages.codecs")


CODECS = {
    codec.id: codec
    for codec in (
        Codec(1, "planes", ".contract.byte_planes", "join_planes"),
        Codec(2, "zstd", ".lossless.zstd", "unzstd", "Zstd"),
        Codec(3, "lz4", ".lossless.lz4", "unlz4", "Lz4"),
        Codec(4, "fp8", ".quantized.fp8", "from_fp8", "Fp8"),
        Codec(5, "int8", ".quantized.int8", "from_int8", "Int8"),
        Codec(6, "int4", ".quantized.int4", "from_int4", "Int4"),
        Codec(7, "turboquant", ".quantized.turboquant", "from_turboquant", "TurboQuant"),
        Codec(8, "rans", ".lossless.rans", "from_rans", "Rans"),
        Codec(9, "cachegen", ".cachegen.stage", "from_cachegen", "CacheGen", describe="describe"),
        Codec(10, "aesgcm", ".encryption.aesgcm", "opened", "AesGcm", encrypts=True),
        Codec(
            11,
            "progressive",
            ".cachegen.progressive",
            "from_progressive",
            "Progressive",
            describe="describe",
        ),
    )
}
"""The one registry of codecs: a new one is a file and a line here."""


STAGES = {
    "blend": "tierloom.stages.passages.blend:Blend",
    "decode": "tierloom.stages.ops.decode:Decode",
    "gather": "tierloom.stages.ops.gather:Gather",
    "get": "tierloom.stages.ops.get:Get",
    "hash": "tierloom.stages.ops.hash:Hash",
    "lookup": "tierloom.stages.ops.lookup:Lookup",
    "put": "tierloom.stages.ops.put:Put",
    "scatter": "tierloom.stages.ops.scatter:Scatter",
    "to_device": "tierloom.stages.ops.to_host:ToDevice",
    "to_host": "tierloom.stages.ops.to_host:ToHost",
} | {c.name: f"{c.full_module}:{c.stage}" for c in CODECS.values() if c.stage}

TIERS = {
    "audit": "tierloom.stages.tiers.wrappers.audit:Audit",
    "blackhole": "tierloom.stages.tiers.wrappers.blackhole:Blackhole",
    "disk": "tierloom.stages.tiers.disk.tier:Disk",
    "files": "tierloom.stages.tiers.files.tier:Files",
    "flaky": "tierloom.stages.tiers.wrappers.faults:Flaky",
    "full": "tierloom.stages.tiers.wrappers.faults:Full",
    "gds": "tierloom.stages.tiers.files.gds:Gds",
    "infinistore": "tierloom.stages.tiers.pools.infinistore:Infinistore",
    "memory": "tierloom.stages.tiers.memory.tier:Memory",
    "mock": "tierloom.stages.tiers.wrappers.mock:Mock",
    "mooncake": "tierloom.stages.tiers.pools.mooncake:Mooncake",
    "nixl": "tierloom.stages.tiers.nixl.tier:Nixl",
    "peer": "tierloom.stages.tiers.peers.tier:Peer",
    "redis": "tierloom.stages.tiers.redis.tier:Redis",
    "s3": "tierloom.stages.tiers.buckets.s3:S3",
    "server": "tierloom.stages.tiers.server.tier:Server",
    "slow": "tierloom.stages.tiers.wrappers.faults:Slow",
    "stuck": "tierloom.stages.tiers.wrappers.faults:Stuck",
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


def load_class(kind: Kind, name: str) -> type[Any]:
    """The class behind `name` or `module:Class`. Raises KeyError (unknown) or ImportError."""
    target = name if ":" in name else names(kind)[name]
    module, _, attribute = target.partition(":")
    found: type[Any] = getattr(import_module(module), attribute)
    return found
