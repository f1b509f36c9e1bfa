"""One process per folder: a lock that dies with its holder, and a marker that names the format.

What cannot be used is set aside, and the folder begun anew: an engine starts whatever lies there.
"""

from __future__ import annotations

import fcntl
import json
import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from tierloom.stages.errors import ConfigError
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.tiers.disk.direct_io import READ_ONLY
from tierloom.stages.tiers.disk.set_aside import numbers, ours, set_aside

_LOCK, _MARKER = "lock", "tierloom.json"
_FORMAT: dict[str, Any] = {"format": "tierloom disk tier", "version": 1}


_locked: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderInUse(ConfigError):
    """Another process uses the folder."""


class FolderLock:
    """A folder that is ours until `release`. A child that is forked does not have it, nor does it
    keep it from others when we are gone."""

    def __init__(self, folder: Path, *, segment: int) -> None:
        """Make, lock and check the folder. Raises ConfigError, with a cure; FolderInUse.

        `segment` is written down the first time; afterwards the folder's own is in force.
        """
        self._fd, self.folder = -1, folder
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fd = _opened(folder / _LOCK)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _locked.add(self)
            self._path, self._was = str(folder / _LOCK), os.fstat(self._fd)
            self._device = folder.stat().st_dev
            self.segment = self._check(folder / _MARKER, segment)
        except BlockingIOError:
            self.release()
            raise FolderInUse(
                f"{folder}: in use by another disk tier; each process needs a folder of its own: "
                "set TIERLOOM_DIR, or the tier's `path`, to another for one of them"
            ) from None
        except OSError as error:
            self.release()
            raise ConfigError(
                f"{folder}: {error.strerror}; choose a folder with write permission"
            ) from error
        except ConfigError:
            self.release()
            raise

    def release(self) -> None:
        """Release the lock. Idempotent."""
        if self._fd >= 0:
            with suppress(OSError):  # a child that was forked by others than Python has it as well
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            self.leave()

    def leave(self) -> None:
        """Close it here, in a child that was forked."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def holds(self) -> bool:
        """False: somebody deleted the lock, perhaps with all that was beside it."""
        try:
            return os.path.samestat(os.stat(self._path), self._was)
        except OSError:
            return False

    @property
    def same_place(self) -> bool:
        """False: another file system is mounted there than when it was locked."""
        there = next(path for path in (self.folder, *self.folder.parents) if path.is_dir())
        return there.stat().st_dev == self._device

    def own(self, owner: bytes) -> None:
        """Note whose folder this is, for `owner_of`."""
        with suppress(OSError):  # a full disk: the next start may choose another folder
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, owner.hex().encode(), 0)

    @staticmethod
    def owner_of(folder: Path) -> str:
        """Who used the folder last, in hex; empty: unknown."""
        try:
            return (folder / _LOCK).read_text()
        except (OSError, ValueError):
            return ""

    @staticmethod
    def segment_of(folder: Path) -> int:
        """Bytes of a segment, as the marker of a disk tier's folder says. Raises ConfigError."""
        try:
            return int(json.loads((folder / _MARKER).read_text())["segment"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{folder}: not the folder of a disk tier: {error}") from error

    @staticmethod
    def _check(marker: Path, segment: int) -> int:
        """The folder's segment size; begins it anew where it cannot be used. Raises OSError."""
        folder = marker.parent
        if wrong := [path for path in ours(folder) if not path.is_file()]:
            set_aside(folder, wrong, "strays", f"{wrong[0].name} is not a file")
        if wrong := [path for path in ours(folder) if not _readable(path)]:
            set_aside(folder, wrong, "strays", f"{wrong[0].name} may not be read")
        found, label, why = _read(marker) if marker.exists() else _guess(folder, segment)
        if found:
            return found
        if why:
            set_aside(folder, ours(folder), label, why)
        fresh = marker.with_suffix(".tmp")
        with fresh.open("w") as file:
            file.write(json.dumps(_FORMAT | {"segment": segment}) + "\n")
            file.flush()
            os.fsync(file.fileno())  # an empty one would cost all that is kept
        fresh.replace(marker)
        return segment


def _readable(path: Path) -> bool:
    return os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids)


def _opened(lock: Path) -> int:
    """A descriptor of the lock; for reading where nothing may be written, which is enough."""
    try:
        return os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        return os.open(lock, os.O_RDONLY)


def _read(marker: Path) -> tuple[int, str, str]:
    """Bytes of a segment; 0: unusable here, with a label and a reason."""
    try:
        found = json.loads(marker.read_text())
        version = int(found.get("version", 0))
        size = int(found["segment"]) if found | _FORMAT == found else 0
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        version = size = 0
    if size >= PAGE and not size % PAGE:
        return size, "", ""
    if version > _FORMAT["version"]:
        return 0, f"version-{version}", f"it is of version {version}, which is not known here"
    return 0, "damaged", f"{marker.name} is damaged"


def _guess(folder: Path, segment: int) -> tuple[int, str, str]:
    """The same without a marker. Segments that can be of this size are gone on with: all of them
    but the last are whole."""
    found = numbers(folder, "segment", "slab")
    sizes = [(folder / f"segment-{n:05}.slab").stat().st_size for n in found]
    if sizes and (max(sizes) > segment or min([segment, *sizes[:-1]]) < segment):
        return 0, "unmarked", f"it has no {_MARKER}, and segments of another size"
    return 0, "", ""


def _in_child() -> None:
    for lock in list(_locked):
        lock.leave()


os.register_at_fork(after_in_child=_in_child)
