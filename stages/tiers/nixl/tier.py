"""nixl: what a disk, a bucket or a parallel file system keeps, moved by a plugin of NVIDIA's NIXL.

    cold: {use: nixl, backend: POSIX, path: /mnt/kv, capacity: 10 TiB}

By files (POSIX, GDS, GDS_MT, HF3FS): a file per object in a folder that hosts may share, named when
its last byte is written; or, with `pool: static`, preallocated segments whose descriptors are
registered once, with an index in this process. By objects (OBJ, AZURE_BLOB): NIXL reads them
straight into their leases, while obstore finds, puts and drops them, which NIXL cannot, or not
without hashing every byte. The arena is registered once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.options import Seconds, Size
from tierloom.stages.tiers.buckets.bucket import S3Options
from tierloom.stages.tiers.contract.tier import Tier, TierContext
from tierloom.stages.tiers.contract.wrapper import WrapperTier
from tierloom.stages.tiers.disk.steady_clock import steady_time
from tierloom.stages.tiers.disk.tier import Disk, DiskOptions
from tierloom.stages.tiers.files.space import FilesOptions
from tierloom.stages.tiers.files.tier import Files
from tierloom.stages.tiers.nixl.agent import NixlFileIO
from tierloom.stages.tiers.nixl.objects import NixlObjects

Backend = Literal["POSIX", "GDS", "GDS_MT", "HF3FS", "OBJ", "AZURE_BLOB"]
_PART = 64 << 20  # one transfer has what is wanted of an object: it needs no memory besides
_OBJECTS = {"OBJ": "s3://", "AZURE_BLOB": "az://"}


@dataclass(frozen=True, kw_only=True, slots=True)
class NixlOptions:
    """Options of a NIXL tier."""

    backend: Backend = "POSIX"
    """NIXL's plugin: POSIX, GDS, GDS_MT and HF3FS keep files, OBJ and AZURE_BLOB objects."""
    path: str = ""
    """A folder, for files; shared unless `pool` is static."""
    url: str = ""
    """`s3://bucket/prefix` for OBJ, `az://container/prefix` for AZURE_BLOB."""
    endpoint: str = ""
    """Server to use instead of the cloud's, as in `http://127.0.0.1:9000`."""
    region: str = ""
    """The bucket's region. Default: from the environment or the profile."""
    profile: str = ""
    """A profile of `~/.aws`. Default: as the `s3` tier finds its credentials."""
    unsigned: bool | Literal["auto"] = "auto"
    """Put objects without hashing them for the signature; auto: over TLS."""
    pool: Literal["dynamic", "static"] = "dynamic"
    """dynamic: a file per object; static: preallocated segments, one process per folder."""
    io: Literal["aio", "uring", "posix_aio"] = "aio"
    """Kernel interface of the POSIX plugin."""
    capacity: Size = 0
    """Most bytes in files; 0: never pruned by us. Required by a static pool."""
    direct: bool | Literal["auto"] = "auto"
    """Bypass the page cache (O_DIRECT): true, false, or auto: if the file system supports it."""
    ttl: Seconds = 0.0
    """How long an object in a file lives; 0: until it is evicted."""
    threads: int = 4
    """Threads of the plugin (GDS_MT, OBJ)."""
    depth: int = 4
    """Most objects of one call that are moved at once."""

    def __post_init__(self) -> None:
        if self.backend not in get_args(Backend):
            raise ValueError(f"backend is {self.backend!r}; known: {', '.join(get_args(Backend))}")
        scheme = _OBJECTS.get(self.backend)
        if scheme:
            if not self.url.startswith(scheme) or self.path:
                raise ValueError(f"{self.backend} needs a url with {scheme}, and no path")
            if self.capacity or self.ttl or self.pool == "static":
                raise ValueError(
                    "capacity, ttl and pool are not supported for a bucket: set its lifecycle rules"
                )
            S3Options(url=self.url, endpoint=self.endpoint, unsigned=self.unsigned)
        elif not self.path or self.url or self.endpoint:
            raise ValueError(f"{self.backend} needs a path, and neither url nor endpoint")
        if self.pool not in ("dynamic", "static") or self.io not in ("aio", "uring", "posix_aio"):
            raise ValueError("pool is dynamic or static; io is aio, uring or posix_aio")
        if self.direct not in (True, False, "auto"):
            raise ValueError(f"direct is {self.direct!r}; known: true, false, auto")
        if self.pool == "static" and self.capacity < PAGE:
            raise ValueError("a static pool needs a capacity")
        if self.capacity < 0 or self.ttl < 0:
            raise ValueError("capacity and ttl must not be negative")
        if min(self.threads, self.depth) < 1:
            raise ValueError("threads and depth must be at least 1")


class Nixl(WrapperTier):
    """The `files`, `disk` or `s3` tier, whose bytes NIXL moves."""

    Options = NixlOptions

    def __init__(
        self, options: NixlOptions, ctx: TierContext, *, clock: Callable[[], float] = steady_time
    ) -> None:
        self.options = options
        self._file_io: NixlFileIO | None = None
        super().__init__(self._make(ctx, clock))

    async def open(self) -> None:
        if self._file_io is not None:
            await self.ctx.pool(self._file_io.start, leases=())
        await super().open()

    async def close(self) -> None:
        await super().close()
        if self._file_io is not None:
            await self.ctx.pool(self._file_io.stop, leases=())

    def _make(self, ctx: TierContext, clock: Callable[[], float]) -> Tier:
        o = self.options
        if o.backend in _OBJECTS:
            s3 = S3Options(
                url=o.url, endpoint=o.endpoint, region=o.region, profile=o.profile, depth=o.depth,
                unsigned=o.unsigned, part=_PART,
            )  # fmt: skip
            return NixlObjects(s3, ctx, backend=o.backend, threads=o.threads)
        self._file_io = NixlFileIO(o.backend, self._params(), ctx.arena)
        if o.pool == "static":
            disk = DiskOptions(
                path=o.path, capacity=o.capacity, ttl=o.ttl, direct=o.direct, depth=o.depth
            )
            return Disk(disk, ctx, clock=clock, file_io=self._file_io)
        files = FilesOptions(path=o.path, capacity=o.capacity, ttl=o.ttl, depth=o.depth)
        return Files(files, ctx, clock=clock, file_io=self._file_io, direct=o.direct)

    def _params(self) -> dict[str, str]:
        """What the plugin is told; all values are text."""
        if self.options.backend == "POSIX":
            return {f"use_{self.options.io}": "true"}
        if self.options.backend == "GDS_MT":
            return {"thread_count": str(self.options.threads)}
        return {}
