"""How much a folder of objects may hold, and which files go first."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tierloom.stages.options import Mode, Seconds, Size
from tierloom.stages.tiers.contract.tier import HoldingsCount, TierCounts

_SPARE = 16  # pruning frees a sixteenth more than is needed, so that scans of the folder are rare


@dataclass(frozen=True, kw_only=True, slots=True)
class FilesOptions:
    """Options of a files tier."""

    path: str
    """A folder, shared or not; `~` is the home folder."""
    capacity: Size = 0
    """Bytes above which this host deletes the least recently used files; 0: never."""
    ttl: Seconds = 0.0
    """How long an object lives after its last use; 0: until it is pruned."""
    fsync: bool = False
    """Sync each file to disk before it gets its name."""
    mode: Mode | None = None
    """Who may use the folders and files that are made, whatever the umask: `0770` for users of one
    group, in a folder of that group with the bit `g+s`. Default: as the umask says."""
    depth: int = 8
    """Most objects of one call that are read or written at once."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty")
        if self.capacity < 0 or self.ttl < 0:
            raise ValueError("capacity and ttl must not be negative")
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}")


class FolderSpace:
    """Counts the files of a folder and prunes it. Thread-safe; blocks."""

    def __init__(
        self, folder: Path, options: FilesOptions, counts: TierCounts, clock: Callable[[], float]
    ) -> None:
        self._folder, self._capacity, self._ttl = folder, options.capacity, options.ttl
        self._counts, self._clock = counts, clock
        self._changing = threading.RLock()
        self._unnamed = 0  # bytes of files that have no name yet
        self.holdings = HoldingsCount(options.capacity)
        """As last seen, and what we did since."""

    def is_over(self, stat: os.stat_result) -> bool:
        """The object has expired."""
        return bool(self._ttl) and stat.st_mtime + self._ttl <= self._clock()

    def reserve(self, nbytes: int) -> bool:
        """Make room for a file that is about to be written; False: it would never fit."""
        with self._changing:
            if self._capacity and self.holdings.stat.nbytes + nbytes > self._capacity:
                if nbytes > self._capacity:
                    return False
                self.prune(nbytes)
            self._unnamed += nbytes
            self.holdings.add(1, nbytes)
            return True

    def named(self, nbytes: int) -> None:
        """A reserved file has its name now, or was not written."""
        with self._changing:
            self._unnamed -= nbytes

    def prune(self, nbytes: int) -> None:
        """Look at every file; unlink what is too old, and the oldest until `nbytes` have room."""
        found = []
        with self._changing:
            for path in self._folder.glob("*/*.tlm"):
                with suppress(FileNotFoundError):
                    found.append((path.stat(), path))
            found.sort(key=lambda each: each[0].st_mtime)
            total = self._unnamed + sum(stat.st_size for stat, _ in found)
            count, limit = len(found), self._capacity - nbytes
            if total > limit:
                limit -= self._capacity // _SPARE
            for stat, path in found:
                full = bool(self._capacity) and total > limit
                if not full and not self.is_over(stat):
                    break
                with suppress(OSError):  # another user's, perhaps
                    path.unlink(missing_ok=True)
                    total, count = total - stat.st_size, count - 1
                    self._counts.evicted += full
            self.holdings.reset(count, total)
