"""gds: one file per object, moved by the threads of kvikio, NVIDIA's library over cuFile.

    cold: {use: gds, path: /mnt/nvme/kv, capacity: 10 TiB}

As `files` in everything else: a folder that hosts may share, a name when the last byte is written.
An object's memory is the host's, and that kvikio moves by parallel POSIX I/O, with a GPU or
without; whether cuFile is there is said once, when the tier is opened. For cuFile itself see `nixl`
with `backend: GDS_MT`.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tierloom.stages.errors import ConfigError, Damaged, MissingPackage, TierDown
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.options import Size
from tierloom.stages.tiers.contract.tier import TierContext
from tierloom.stages.tiers.disk.direct_io import FileIO
from tierloom.stages.tiers.disk.steady_clock import steady_time
from tierloom.stages.tiers.files.space import FilesOptions
from tierloom.stages.tiers.files.tier import Files

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class GdsOptions(FilesOptions):
    """Options of a gds tier."""

    threads: int = 4
    """Threads of kvikio, shared by the tiers of this process."""
    task: Size = 4 << 20
    """Bytes that a thread moves at a time."""

    def __post_init__(self) -> None:
        super(GdsOptions, self).__post_init__()
        if self.threads < 1 or self.task < PAGE:
            raise ValueError(f"threads must be at least 1, task at least {PAGE}")


class Gds(Files):
    """The `files` tier, whose bytes kvikio moves."""

    Options = GdsOptions

    def __init__(
        self, options: GdsOptions, ctx: TierContext, *, clock: Callable[[], float] = steady_time
    ) -> None:
        self._kvikio = KvikioFileIO(options)
        super().__init__(options, ctx, clock=clock, file_io=self._kvikio)

    async def open(self) -> None:
        await self.ctx.pool(self._kvikio.start, leases=())
        await super().open()


class KvikioFileIO(FileIO):
    """Files by kvikio; for threads, each of which waits for what it began."""

    def __init__(self, options: GdsOptions) -> None:
        self._options = options
        self._api: Any = None
        self._files: dict[int, Any] = {}

    def start(self) -> None:
        """Raises ConfigError if the client or a usable driver is missing. Idempotent."""
        if self._api is not None:
            return
        try:
            import kvikio
            import kvikio.cufile_driver
            import kvikio.defaults

            kvikio.defaults.set(
                {"num_threads": self._options.threads, "task_size": self._options.task}
            )
            there = bool(kvikio.cufile_driver.properties.is_gds_available)
        except ImportError:
            raise MissingPackage("kvikio, the gds tier's client,", "gds") from None
        except Exception as error:
            raise ConfigError(f"kvikio cannot start: {_first_line(error)}") from None
        self._api = kvikio
        try:
            self._probe()
        except (OSError, TierDown) as error:
            self._api = None
            raise ConfigError(
                f"kvikio cannot move data here ({error}): it needs NVIDIA's driver, libcuda.so.1"
            ) from None
        log.info("gds tier moves bytes by POSIX I/O", extra={"cufile": there})

    def open(self, path: Path, flags: int, mode: int = 0o666) -> int:
        fd = super().open(path, flags, mode)
        try:
            # By the descriptor: another file may have taken the name meanwhile.
            there = f"/proc/self/fd/{fd}"
            self._files[fd] = self._api.CuFile(there, "r+" if flags & os.O_RDWR else "r")
        except BaseException as error:
            super().close(fd)
            raise TierDown(f"kvikio: open failed: {_first_line(error)}") from None
        return fd

    def close(self, fd: int) -> None:
        try:
            self._files.pop(fd).close()
        finally:
            super().close(fd)

    def read(self, fd: int, view: memoryview, at: int) -> None:
        if self._go("pread", fd, view, at) != len(view):
            raise Damaged("the file ends inside the object")

    def write(self, fd: int, view: memoryview, at: int) -> None:
        os.posix_fallocate(fd, at, len(view))  # kvikio would not tell that a disk is full
        if self._go("pwrite", fd, view, at) != len(view):
            raise TierDown("kvikio: wrote fewer bytes than requested")

    def _go(self, verb: str, fd: int, view: memoryview, at: int) -> int:
        """Bytes moved. kvikio would cut `view` into tasks by itself, but older releases tell of one
        that fails while others are still at our memory: so each is asked for, and waited for."""
        begin, size = getattr(self._files[fd], verb), self._options.task
        begun, failed, moved = [], [], 0
        try:
            for first in range(0, len(view), size):
                part = np.frombuffer(view[first : first + size], np.uint8)
                begun.append(begin(part, len(part), at + first, len(part)))
        except Exception as error:
            failed.append(error)
        for each in begun:
            try:
                moved += int(each.get())
            except Exception as error:  # noqa: PERF203
                failed.append(error)
        if failed:
            raise TierDown(f"kvikio: {verb} failed: {_first_line(failed[0])}")
        return moved

    def _probe(self) -> None:
        """A page there and back. Raises OSError, TierDown."""
        page = memoryview(bytearray(os.urandom(PAGE)))
        back = memoryview(bytearray(PAGE))
        with tempfile.TemporaryDirectory() as folder:
            fd = self.open(Path(folder) / "probe", os.O_RDWR | os.O_CREAT)
            try:
                self.write(fd, page, 0)
                self.read(fd, back, 0)
            finally:
                self.close(fd)
        if page != back:
            raise TierDown("kvikio: read back other bytes than were written")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
