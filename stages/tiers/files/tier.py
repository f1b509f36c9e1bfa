"""files: one file per object in a folder that several hosts may share (NFS, Lustre, CephFS).

    cold: {use: files, path: /mnt/kv, capacity: 10 TiB}

There is no index: the file system says whether an object exists. A file gets its name when its last
byte is written, so two writers of one key do not conflict. Its modification time is its
last use; `ttl` and pruning go by that, on a clock that nobody sets.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISGID, S_ISREG
from typing import Literal

from tierloom.stages.errors import ConfigError, Damaged, Lost, TierDown, Unreadable
from tierloom.stages.kv.object import Header, Object
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.memory.arena import Lease
from tierloom.stages.tiers.contract.concurrently import PrefixSearch, map_concurrently
from tierloom.stages.tiers.contract.object_reader import ObjectReader
from tierloom.stages.tiers.contract.tier import Read, SharedTier, TierContext, require_sealed
from tierloom.stages.tiers.disk.default_folder import defaults_only_down
from tierloom.stages.tiers.disk.direct_io import (
    NO_SPACE,
    SYSTEM,
    FileIO,
    begins_with,
    reserve,
    want_direct,
)  # fmt: skip
from tierloom.stages.tiers.disk.steady_clock import steady_time
from tierloom.stages.tiers.files.space import FilesOptions, FolderSpace
from tierloom.stages.user_home import expanded

_CLOCKS_APART = 60.0  # seconds, from which on the system's clock was set meanwhile


class Files(SharedTier):
    """Whole chunks only: inner links are found in local tiers."""

    Options = FilesOptions
    one_by_one = True

    def __init__(
        self, options: FilesOptions, ctx: TierContext, *, clock: Callable[[], float] = steady_time,
        file_io: FileIO = SYSTEM, direct: bool | Literal["auto"] = False,
    ) -> None:  # fmt: skip
        """`direct`: bypass the page cache, for a FileIO that gains by it."""
        super().__init__(ctx)
        self.options = options
        self._file_io, self._direct, self._flags = file_io, direct, 0
        self._device = 0
        self._clock = clock
        name = ctx.namespace.hex()[:32] or "any"
        self._folder = expanded(options.path) / name
        self._mode = int(options.mode, 8) if options.mode else 0
        self._writer = f"{socket.gethostname()}-{os.getpid()}"
        self._space = FolderSpace(self._folder, options, self.counts, clock)
        self._holdings = self._space.holdings  # exact with one writer, if `capacity` is set

    async def open(self) -> None:
        await self.ctx.pool(self._open, leases=())

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        found: list[bool] = await self.ctx.pool(self._has, list(keys), leases=())
        return found

    async def prefix_length(self, keys: Sequence[bytes]) -> int:
        return int(await self.ctx.pool(self._prefix, list(keys), leases=()))

    async def read(self, reads: Sequence[Read]) -> None:
        await map_concurrently(self._read, reads, self.options.depth)

    async def put(self, objects: Sequence[Object]) -> list[Lost | None]:
        return await map_concurrently(self._put, objects, self.options.depth)

    async def delete(self, keys: Sequence[bytes]) -> int:
        paths = [self._path(key) for key in keys]
        return int(await self.ctx.pool(self._drop, paths, leases=()))

    async def clear(self) -> int:
        return int(await self.ctx.pool(self._clear, leases=()))

    async def _read(self, read: Read) -> None:
        path = self._path(read.key)
        with ObjectReader(read, self.ctx.arena, self.counts) as reader:
            held = reader.held is not None
            nbytes = 0 if held else await self.ctx.pool(self._size, path, leases=())
            if not held and not nbytes:
                reader.miss()
                return
            lease = reader.lease(nbytes)
            args = path, read.key, lease, reader.loaded, read.upto
            header = await self.ctx.pool(self._load, *args, leases=(lease,))
            reader.deliver(header, min(read.upto, len(header.frames)))

    async def _put(self, obj: Object) -> Lost | None:
        require_sealed(obj)
        written: int | Lost = await self.ctx.pool(self._save, obj, leases=(obj.lease,))
        if isinstance(written, Lost):
            self.counts.refused += 1
            return written
        self.counts.puts += written > 0
        self.counts.bytes_in += written
        return None

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self._folder / name[:2] / f"{name}.tlm"

    def _open(self) -> None:
        try:
            self._make(self._folder)
            self._device = self._folder.stat().st_dev
            self._space.open()
        except OSError as error:
            cause = f"{self._folder}: {error.strerror}; choose a folder with write permission"
            with defaults_only_down(self.options.path):
                raise ConfigError(cause) from error
        self._flags = os.O_DIRECT if want_direct(self._folder, self._direct) else 0

    def _has(self, keys: list[bytes]) -> list[bool]:
        return [self._size(self._path(key)) > 0 for key in keys]

    def _prefix(self, keys: list[bytes]) -> int:
        search = PrefixSearch(len(keys), 1)
        while search.asks:
            search.told(self._has([keys[i] for i in search.asks]))
        return search.length

    def _size(self, path: Path) -> int:
        """Bytes to lease for a file; 0 when it is not there, or its time is over."""
        try:
            stat = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return 0
        return 0 if self._space.is_over(stat) else max(stat.st_size, PAGE)

    def _load(self, path: Path, key: bytes, lease: Lease, loaded: int, upto: int) -> Header:
        """Frames `loaded` to `upto` into the lease; the header too, while no frame is loaded.

        Raises FileNotFoundError, or BadObject; where it is Damaged (cut short, not an object, in
        another's place), the file is unlinked.
        """
        try:
            _require_file(path)
            with self._opened(path, os.O_RDONLY) as fd:
                try:
                    header = self._fill(fd, key, lease, loaded, upto)
                except Damaged as proof:
                    _expel(fd, path, proof)
                    raise
            now = self._clock()
            with suppress(OSError):  # readable, but perhaps not writable for us
                try:
                    os.utime(path, (now, now))
                except PermissionError:  # another user's, which we may write: by the system's clock
                    if abs(time.time() - now) < _CLOCKS_APART:
                        os.utime(path)
        except OSError as error:
            if error.errno == errno.ESTALE:
                raise FileNotFoundError(path) from error
            if error.errno in (errno.EACCES, errno.EPERM):
                raise Unreadable(
                    Lost.FOREIGN,
                    f"{path.name}: {error.strerror}; users who share a folder set mode: 0770",
                ) from None
            raise
        else:
            return header

    def _fill(self, fd: int, key: bytes, lease: Lease, loaded: int, upto: int) -> Header:
        """Raises FileNotFoundError when another object of this key took the place, BadObject,
        OSError."""
        view, size = lease.view, os.fstat(fd).st_size
        if not size or size % PAGE:
            with open(f"/proc/self/fd/{fd}", "rb") as plain:  # not O_DIRECT: of any length
                Header.length(plain.read(PAGE))  # as objects of a later format may be
            raise Damaged(f"an object cannot be {size} bytes long")
        if size != lease.nbytes:
            raise FileNotFoundError(key.hex())
        if loaded and not begins_with(self._file_io, fd, view[: Header.length(view[:PAGE])]):
            # Of the same length: encrypting an object again gives other bytes.
            raise FileNotFoundError(key.hex())
        if not loaded:
            self._file_io.read(fd, view[:PAGE], 0)
            head = Header.length(view[:PAGE])
            if head > size:
                raise Damaged("the file ends inside its header")
            if head > PAGE:
                self._file_io.read(fd, view[PAGE:head], PAGE)
        header = Header.unpack(view, key=key, namespace=self.ctx.namespace)
        if header.nbytes != size:
            raise Damaged(f"the file is {size} bytes long, its object {header.nbytes}")
        boundaries = header.boundaries
        begin, end = boundaries[loaded], boundaries[min(upto, len(header.frames))]
        if begin < end:
            self._file_io.read(fd, view[begin:end], begin)
        return header

    def _save(self, obj: Object) -> int | Lost:
        """Bytes written: 0 when the object is there already."""
        path, nbytes = self._path(obj.header.key), obj.header.nbytes
        if self._size(path):
            return 0
        self._drop([path])  # one whose time is over
        if not self._space.reserve(path, nbytes):
            return Lost.NO_ROOM
        try:
            self._write(path, obj.lease.view[:nbytes])
        except BaseException as error:
            self._space.not_written(path, nbytes)
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                return Lost.NO_ROOM
            raise
        self._space.named(path, nbytes)
        return nbytes

    def _write(self, path: Path, view: memoryview) -> None:
        if not path.parent.is_dir():
            self._require_same_place()
            self._make(path.parent)
        temp = path.with_name(f"{path.stem}.{self._writer}-{secrets.token_hex(4)}.tmp")
        try:
            with self._opened(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
                if self._mode:
                    os.fchmod(fd, self._mode & 0o666)
                if self._flags:
                    reserve(fd, 0, len(view))
                self._file_io.write(fd, view, 0)
                now = self._clock()  # by one clock with what `ttl` is measured by
                os.utime(fd, (now, now))
                if self.options.fsync:
                    os.fsync(fd)
            temp.replace(path)
        finally:
            temp.unlink(missing_ok=True)

    def _require_same_place(self) -> None:
        """Somebody deleted folders of ours. Raises TierDown where another file system is mounted
        there than at the start: that would fill the wrong one."""
        there = next(each for each in (self._folder, *self._folder.parents) if each.is_dir())
        if there.stat().st_dev != self._device:
            raise TierDown(
                f"{self._folder}: another file system is mounted there than at the start"
            )

    def _make(self, folder: Path) -> None:
        """A folder, and those above it that are missing. Raises OSError."""
        for each in reversed([each for each in (folder, *folder.parents) if not each.is_dir()]):
            with suppress(FileExistsError):  # another writer's
                each.mkdir()
                if self._mode:
                    each.chmod(self._mode | each.stat().st_mode & S_ISGID)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))

    @contextmanager
    def _opened(self, path: Path, flags: int) -> Iterator[int]:
        fd = self._file_io.open(path, flags | self._flags)
        try:
            yield fd
        finally:
            self._file_io.close(fd)

    def _drop(self, paths: list[Path]) -> int:
        dropped = 0
        for path in paths:
            with suppress(FileNotFoundError):
                nbytes = path.stat().st_size
                path.unlink()
                self._space.deleted(path, nbytes)
                dropped += 1
        return dropped

    def _clear(self) -> int:
        return self._drop(list(self._folder.glob("*/*.tlm")))


def _require_file(path: Path) -> None:
    """Raises Unreadable for what is a folder, or what opening may wait for; OSError."""
    if not S_ISREG(path.stat().st_mode):
        raise Unreadable(Lost.FOREIGN, f"{path.name} is not a file")


def _expel(fd: int, path: Path, proof: Damaged) -> None:
    """Unlink the file that `fd` is, on proof that it is damaged, unless another has its name."""
    with suppress(OSError):  # readable, but perhaps not ours to unlink
        if os.path.samestat(os.fstat(fd), path.stat()):
            path.unlink()
