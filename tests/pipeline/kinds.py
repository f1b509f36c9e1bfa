"""Which kinds of remote stores there are, and what can be done with which."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from stores import (
    S3,
    Disk,
    Files,
    Gds,
    InfiniStore,
    Lent,
    Mooncake,
    NixlObj,
    NixlPosix,
    NixlStatic,
    Redis,
    Served,
    ServedFiles,
    Store,
)

KINDS: dict[str, Callable[[Path], Store]] = {
    "redis": Redis,
    "server-tcp": lambda folder: Served(folder, "tcp"),
    "server-unix": lambda folder: Served(folder, "unix"),
    "server-shared": lambda folder: Served(folder, "shared"),
    "s3": S3,
    "nixl-obj": NixlObj,
    "nixl-posix": NixlPosix,
    "nixl-static": NixlStatic,
    "mooncake": Mooncake,
    "infinistore": InfiniStore,
}
if importlib.util.find_spec("kvikio") is not None:  # in its own environment: see tests/tiers
    KINDS["gds"] = Gds
OTHERS: dict[str, Callable[[Path], Store]] = {
    "files": Files,
    "disk": Disk,
    "redis-small": lambda folder: Redis(
        folder, "--maxmemory", "3mb", "--maxmemory-policy", "allkeys-random"
    ),
    "server-tcp-files": lambda folder: ServedFiles(folder, "tcp"),
    "server-unix-files": lambda folder: ServedFiles(folder, "unix"),
    "server-lent": Lent,
}
"""Kinds of which a part of the suite wants another set-up."""
SERVED = [name for name in KINDS if name not in ("nixl-posix", "nixl-static", "gds")]
WIRED = ["redis", "server-tcp", "s3", "nixl-obj", "infinistore"]
"""Those that a gate can stand in front of."""
DAMAGED = [
    "files", "disk", *(name for name in KINDS if not name.startswith("server")),
    "server-tcp-files", "server-unix-files", "server-lent",
]  # fmt: skip

READ = [*DAMAGED, "server-shared"]
"""Those that several readers read."""


def kinds(names: list[str]) -> pytest.MarkDecorator:
    """The test is done with a store of each of these kinds."""
    params = [
        pytest.param(name, marks=[pytest.mark.infinistore] if name == "infinistore" else [])
        for name in names
    ]
    return pytest.mark.parametrize("store", params, indirect=True)
