"""The tiers: each starts its servers on this machine, and says how they are reached.

To add one: a function that yields a `Place`, and a line in PLACES.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import buckets
import pools
import servers
import store_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from processes import Process

REST = 1.2
"""Seconds between stores: Redis tells old from new by a clock of seconds, and would otherwise evict
pieces of what is being stored."""


class Place(NamedTuple):
    """A tier whose servers run."""

    options: dict[str, Any]
    """The tier's own; no time limits."""
    preset: str
    """The one whose time limits hold when a server fails."""
    servers: dict[str, Process]
    """What each is called. They can hang and die; their CPU time is the server's."""
    evicts: bool = True
    """A full one makes room by itself; else it is emptied between stores."""
    rest: float = 0.0
    """Seconds to leave before a request."""


@contextmanager
def memory(folder: Path, room: int) -> Iterator[Place]:
    """The engine's own: what the others stand beside."""
    yield Place({"use": "memory", "capacity": room}, "minimal", {})


@contextmanager
def redis(folder: Path, room: int, find: Callable[[], str]) -> Iterator[Place]:
    """`find()`: the program."""
    limit = ["--maxmemory", str(room), "--maxmemory-policy", "allkeys-lru"]
    with servers.redis(*limit, "--maxmemory-samples", "10", program_=find()) as server:
        url = f"redis://127.0.0.1:{server.port}/0"
        yield Place({"use": "redis", "url": url}, "redis", {"server": server}, rest=REST)


@contextmanager
def server(folder: Path, room: int, way: str) -> Iterator[Place]:
    """`way`: tcp, unix, or shared: a unix socket, and the server's memory mapped."""
    tiers = {"hot": {"use": "memory", "capacity": room}}
    with tempfile.TemporaryDirectory() as made:  # a socket's path must be short
        listen = "tcp://127.0.0.1:0" if way == "tcp" else f"unix://{made}/socket"
        with store_server.process(
            Path(made), tiers=tiers, arena="512 MiB", listen=(listen,)
        ) as process:
            options = {"use": "server", "url": process.url, "share": way == "shared"}
            yield Place(options, "server", {"server": process})


@contextmanager
def s3(folder: Path, room: int) -> Iterator[Place]:
    with bucket(folder) as process:
        options = {"use": "s3", "url": f"s3://{buckets.NAME}/tier", "endpoint": process.url}
        yield Place(options | {"unsigned": True}, "s3", {"bucket": process}, evicts=False)


@contextmanager
def nixl_posix(folder: Path, room: int) -> Iterator[Place]:
    """No server but the kernel."""
    # Pruning frees a sixteenth more than is needed.
    options = {"use": "nixl", "path": str(folder / "tier"), "capacity": room + room // 4}
    yield Place(options | {"direct": True}, "nixl-posix", {})


@contextmanager
def nixl_obj(folder: Path, room: int) -> Iterator[Place]:
    with bucket(folder) as process:
        options = {"use": "nixl", "backend": "OBJ", "url": f"s3://{buckets.NAME}/tier"}
        options |= {"endpoint": process.url, "unsigned": True}
        yield Place(options, "nixl-obj", {"bucket": process}, evicts=False)


@contextmanager
def mooncake(folder: Path, room: int) -> Iterator[Place]:
    """Its master evicts what has no lease, and says no until it has: it is emptied instead."""
    pools.require("mooncake")
    folder.mkdir(parents=True)
    pool = pools.MooncakePool(folder, segment=1 << 30)
    try:
        options = {"use": "mooncake", "url": pool.url, "segment": 0}
        processes = {"master": pool.master, "owner": pool.owners[0]}
        yield Place(options, "mooncake", processes, evicts=False)
    finally:
        pool.close()


@contextmanager
def infinistore(folder: Path, room: int) -> Iterator[Place]:
    pools.require("infinistore")
    folder.mkdir(parents=True)
    process = pools.InfiniServer(folder)
    try:
        options = {"use": "infinistore", "url": process.url}
        yield Place(options, "infinistore", {"server": process})
    finally:
        process.kill()


def bucket(folder: Path) -> AbstractContextManager[buckets.Server]:
    """A server of buckets on this machine, and credentials that it does not look at."""
    os.environ |= {
        "AWS_ACCESS_KEY_ID": buckets.KEY, "AWS_SECRET_ACCESS_KEY": buckets.SECRET,
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_REGION": "us-east-1",
    }  # fmt: skip
    return buckets.localbucket(folder)


PLACES: dict[str, Callable[[Path, int], AbstractContextManager[Place]]] = {
    "memory": memory,
    "redis": partial(redis, find=servers.redis_program),
    "valkey": partial(redis, find=servers.valkey_program),
    "server-tcp": partial(server, way="tcp"),
    "server-unix": partial(server, way="unix"),
    "server-shared": partial(server, way="shared"),
    "s3": s3,
    "nixl-posix": nixl_posix,
    "nixl-obj": nixl_obj,
    "mooncake": mooncake,
    "infinistore": infinistore,
}
"""Each is given an own folder, which it may have to make, and bytes of objects to have room for."""
