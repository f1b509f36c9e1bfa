"""How much a folder of objects may hold, and which files go first.

Keys are hashes, so each of its 256 subfolders is a fair sample of all. They are looked at one by
one, round and round, by the threads that put: what they hold is added up, what is too old goes, and
where there is no room the oldest of a sample go. So no call looks at all of a large folder.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tierloom.stages.options import Mode, Seconds, Size
from tierloom.stages.tiers.contract.tier import HoldingsCount, TierCounts

_SAMPLE = 256
"""Files among which the oldest are chosen, or all if there are fewer."""
_SHARE = 16
"""Of a sample, a sixteenth goes: the same files as if all were sorted, give or take a few."""
_OPENING = 1.0
"""Seconds for which opening looks; of what it has not seen by then, it assumes the average."""
_EVERY = 10.0
"""Seconds between two looks once all was seen: others put and delete there, too."""
_PAUSE = 0.001
"""Seconds that a look sleeps after each sample, so that nobody waits long for the interpreter."""
_STALE = 3600.0
"""Seconds after which a file half written belongs to nobody."""
_AGAIN = 60.0
"""Seconds before room is made again where all files are others'."""


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


class _Aged(NamedTuple):
    """A file, and when it was used last."""

    used: float
    nbytes: int
    path: Path


@dataclass(slots=True)
class _Subfolder:
    """What is known of it. `writing`: files of ours that have no name yet; they count as there."""

    objects: int = 0
    nbytes: int = 0
    writing: int = 0
    unnamed: int = 0
    """Bytes of these."""
    changes: int = 0


class FolderSpace:
    """Counts the files of a folder and prunes it. Thread-safe; blocks."""

    def __init__(
        self, folder: Path, options: FilesOptions, counts: TierCounts, clock: Callable[[], float]
    ) -> None:
        """`clock`: what files are dated by, in seconds since the epoch."""
        self._folder, self._capacity, self._ttl = folder, options.capacity, options.ttl
        self._counts, self._clock = counts, clock
        self._lock = threading.Lock()
        """For sums alone."""
        self._subfolders: dict[str, _Subfolder] = {}
        self._unseen: set[str] = set()
        """Subfolders of others, not looked at yet: each counts as the average of the rest."""
        self._looking = threading.Lock()
        """One thread looks at a time. It guards what follows."""
        self._round: deque[str] = deque()
        """Subfolders that are due, before all are again."""
        self._oldest: deque[_Aged] = deque()
        self._refused: set[Path] = set()
        """Files that are not ours to delete."""
        self._look_at = self._make_room_at = 0.0
        self.holdings = HoldingsCount(options.capacity)
        """As seen, and what we did since; where not all was seen, an estimate."""

    def is_over(self, stat: os.stat_result) -> bool:
        """The object has expired."""
        return bool(self._ttl) and stat.st_mtime + self._ttl <= self._clock()

    def open(self) -> None:
        """Look at a sample, and on for a second at most; make room. Raises OSError."""
        until, seen = time.monotonic() + _OPENING, 0
        with self._looking:
            self._begin_round()
            while self._round and (seen < _SAMPLE or time.monotonic() < until):
                seen += 1 + len(self._look(self._round.popleft()))
        self._make_room()

    def reserve(self, path: Path, nbytes: int) -> bool:
        """Make room for a file that is about to be written; False: it would never fit."""
        if self._capacity and nbytes > self._capacity:
            return False
        self._change(path, 1, nbytes, writing=1, unnamed=nbytes)
        self._make_room()
        self._look_on()
        return True

    def named(self, path: Path, nbytes: int) -> None:
        """A reserved file has its name now."""
        self._change(path, writing=-1, unnamed=-nbytes)
        self._make_room()

    def not_written(self, path: Path, nbytes: int) -> None:
        """Nor will a reserved file be."""
        self._change(path, -1, -nbytes, writing=-1, unnamed=-nbytes)

    def deleted(self, path: Path, nbytes: int) -> None:
        self._change(path, -1, -nbytes)

    def _change(
        self, path: Path, objects: int = 0, nbytes: int = 0, *, writing: int = 0, unnamed: int = 0
    ) -> None:
        with self._lock:
            subfolder = self._subfolders.setdefault(path.parent.name, _Subfolder())
            subfolder.objects += objects
            subfolder.nbytes += nbytes
            subfolder.writing += writing
            subfolder.unnamed += unnamed
            subfolder.changes += 1
            self.holdings.add(objects, nbytes)

    def _begin_round(self) -> None:
        """Raises OSError."""
        with os.scandir(self._folder) as entries:
            names = [each.name for each in entries if len(each.name) == 2 and each.is_dir()]
        random.shuffle(names)  # else many hosts would look where the others do
        self._round = deque(names)
        with self._lock:
            for name in self._subfolders.keys() - names:
                if not self._subfolders[name].writing:
                    del self._subfolders[name]
            self._unseen &= set(names)
            self._unseen |= set(names) - self._subfolders.keys()

    def _look_on(self) -> None:
        """Look at one more subfolder, if that is due and nobody does."""
        if not (self._capacity or self._ttl) or time.monotonic() < self._look_at:
            return
        if self._looking.acquire(blocking=False):
            try:
                if not self._round:
                    with suppress(OSError):
                        self._begin_round()
                if self._round:
                    self._look(self._round.popleft())
                self._look_at = 0.0 if self._unseen else time.monotonic() + _EVERY
            finally:
                self._looking.release()

    def _look(self, name: str) -> list[_Aged]:
        """Count a subfolder; its files, without those that were too old."""
        with self._lock:
            subfolder = self._subfolders.setdefault(name, _Subfolder())
            changes = subfolder.changes
        found: list[_Aged] = []
        over: list[_Aged] = []
        for aged, expired in self._files(name):
            (over if expired else found).append(aged)
        with self._lock:
            # Where it changed meanwhile, nobody knows whether that was seen: the old figures stay.
            if subfolder.changes == changes or name in self._unseen:
                there = [*found, *over]
                subfolder.objects = len(there) + subfolder.writing
                subfolder.nbytes = sum(each.nbytes for each in there) + subfolder.unnamed
                self._unseen.discard(name)
            self.holdings.reset(*self._sums())
        for aged in over:
            self._unlink(aged)
        return found

    def _files(self, name: str) -> Iterator[tuple[_Aged, bool]]:
        """Files of objects, and whether each is too old. What was half written long ago goes."""
        with suppress(OSError), os.scandir(self._folder / name) as entries:
            for count, entry in enumerate(entries, 1):
                with suppress(OSError):  # gone, or another user's
                    if entry.name.endswith(".tmp"):
                        if self._is_stale(entry.stat().st_mtime):
                            os.unlink(entry.path)
                    elif entry.name.endswith(".tlm") and (self._capacity or self._ttl):
                        stat = entry.stat()
                        aged = _Aged(stat.st_mtime, stat.st_size, Path(entry.path))
                        yield aged, self.is_over(stat)
                if not count % _SAMPLE:
                    time.sleep(_PAUSE)

    def _is_stale(self, began: float) -> bool:
        """By both clocks: either may be far off, where the system's was set meanwhile."""
        return began < min(time.time(), self._clock()) - _STALE

    def _sums(self) -> tuple[int, int]:
        """Objects and bytes of all, under the lock."""
        seen = [s for name, s in self._subfolders.items() if name not in self._unseen]
        rest = len(self._unseen) / max(1, len(seen))
        objects, nbytes = sum(s.objects for s in seen), sum(s.nbytes for s in seen)
        return objects + round(objects * rest), nbytes + round(nbytes * rest)

    def _make_room(self) -> None:
        """Delete what was used longest ago until the rest fits. Two that do so at once take turns
        file by file."""
        while self._capacity and self.holdings.stat.nbytes > self._capacity:
            if time.monotonic() < self._make_room_at:
                return
            with self._looking:
                if not self._oldest:
                    self._oldest.extend(self._sample())
                if self._oldest:
                    self._delete(self._oldest.popleft())
                    continue
                if self._refused:
                    self._refused.clear()
                    self._make_room_at = time.monotonic() + _AGAIN
                return  # else what there is has no name yet, and sees to it when it has

    def _sample(self) -> list[_Aged]:
        """The oldest of enough files, oldest first."""
        found: set[_Aged] = set()
        if self.holdings.stat.objects <= _SAMPLE:
            self._round.clear()
        for _ in range(2):  # what is left of this round, and all of the next
            while self._round and len(found) < _SAMPLE:
                here = self._look(self._round.popleft())
                found.update(each for each in here if each.path not in self._refused)
            if len(found) < _SAMPLE:
                with suppress(OSError):
                    self._begin_round()
        return sorted(found)[: max(1, len(found) // _SHARE)]

    def _delete(self, aged: _Aged) -> None:
        """Unless it was used meanwhile."""
        try:
            if aged.path.stat().st_mtime == aged.used:
                self._counts.evicted += self._unlink(aged)
        except FileNotFoundError:
            self._look(aged.path.parent.name)  # somebody else deletes here
        except OSError:
            self._refused.add(aged.path)

    def _unlink(self, aged: _Aged) -> bool:
        try:
            aged.path.unlink()
        except OSError:  # another user's, perhaps
            self._refused.add(aged.path)
            return False
        self.deleted(aged.path, aged.nbytes)
        return True
