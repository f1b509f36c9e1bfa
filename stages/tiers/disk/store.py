"""The blocking half of the disk tier: objects in segment files, called from threads of the pool.

Space is found by exact size first, and neighbors that fall free are merged; an object that no
single hole can take is spread over up to four. Fixed size classes, which calcify when the mix of
sizes changes, and compaction are not needed: with mixed sizes some 99 % of the capacity hold
objects. Nothing is unlinked to evict, and nothing is synced on the way: a power cut may cost what
was put since the last snapshot, and gives no wrong byte.

The order that makes this safe: data is written, then its record is logged, then it is visible; a
drop is logged before what its space is used for next. Each call ends what it began even when its
caller has gone. A folder that cannot be written is read: full, read-only, or another user's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Literal

from tierloom.stages.errors import Damaged, Lost
from tierloom.stages.kv.object import Header, Object
from tierloom.stages.memory.allocator import Space
from tierloom.stages.memory.arena import Lease
from tierloom.stages.tiers.contract.eviction import PolicyName
from tierloom.stages.tiers.contract.index import Entry, Index
from tierloom.stages.tiers.contract.tier import TierCounts, TierWatch
from tierloom.stages.tiers.disk.direct_io import SYSTEM, FileIO, want_direct
from tierloom.stages.tiers.disk.disk_segments import Segments
from tierloom.stages.tiers.disk.folder_lock import FolderLock
from tierloom.stages.tiers.disk.index_log import DROP, PIN, UNPIN, Extent, IndexLog
from tierloom.stages.tiers.disk.open_folder import OpenFolder

log = logging.getLogger(__name__)

_PIECES = 4  # holes an object may be spread over


class SegmentStore(OpenFolder):
    """Thread-safe and blocking. What changes the index does so under `_changing`."""

    def __init__(
        self,
        path: str,
        capacity: int,
        *,
        segment: int,
        policy: PolicyName,
        ttl: float,
        direct: bool | Literal["auto"],
        keep_free: int,
        namespace: bytes,
        counts: TierCounts,
        watch: TierWatch | None,
        clock: Callable[[], float],
        file_io: FileIO = SYSTEM,
    ) -> None:
        super().__init__(path, segment=segment, namespace=namespace)
        self._file_io = file_io
        self.capacity = capacity
        self.index: Index[Extent] = Index(
            policy, capacity, ttl=ttl, clock=clock, in_use=lambda extent: extent.readers > 0,
            watch=watch,
        )  # fmt: skip
        self._direct, self._keep_free, self._counts = direct, keep_free, counts
        self._changing = threading.Lock()  # taken before the index's lock, never after it
        self._snapshotting = threading.Lock()

    def load(self, entry: Entry[Extent], lease: Lease, start: int, end: int) -> Header:
        """Bytes `start` to `end` of an object into its lease; its header, which is there already
        when `start` is not 0.

        Raises FileNotFoundError when it was evicted meanwhile, BadObject when it is not the object
        that the index says; where that is Damaged, it is dropped. Frames are not verified here: who
        decodes them does.
        """
        try:
            with self._work():
                return self._load(entry, lease, start, end)
        except FileNotFoundError:
            self._look_whether_emptied()
            raise

    def save(self, obj: Object) -> Lost | None:
        """Write a sealed object and show it; None when it is there now. Raises OSError, TierDown
        (somebody emptied the folder, and it cannot be had again)."""
        self._look_whether_emptied()
        with self._work():
            header = obj.header
            pieces = self._room(header.key, header.nbytes)
            if pieces is None:
                return Lost.NO_ROOM
            extent = Extent(pieces, header.boundaries)
            kept = False
            try:
                self._segments.write(pieces, obj.lease.view[: header.nbytes])
                kept = self._show(header, extent)
            finally:
                if not kept:
                    self._give(extent)
            if self._index_log.long:
                self._snapshot()
        return None

    def delete(self, keys: Sequence[bytes]) -> int:
        with self._work(), self._changing:
            found = [entry for key in keys if (entry := self.index.get(key)) is not None]
            return self._forget(found)

    def clear(self) -> int:
        with self._work(), self._changing:
            return self._forget(list(self.index))

    def pin(self, keys: Sequence[bytes], *, pinned: bool) -> int:
        """Does no I/O: the log has it with its next record."""
        found = [key for key in keys if self.index.pin(key, pinned=pinned)]
        if found:
            self._index_log.later(PIN if pinned else UNPIN, found)
        return len(found)

    def _load(self, entry: Entry[Extent], lease: Lease, start: int, end: int) -> Header:
        with self._reading(entry) as there:
            if not there:
                raise FileNotFoundError(entry.key.hex())
            try:
                return self._read(entry, lease, start, end)
            except Damaged as proof:
                self._expel(entry, proof)
                raise
            except FileNotFoundError:
                if self._lock is not None and self._lock.holds:  # somebody deleted its segment
                    self._expel(entry, Damaged("its file is gone"))
                raise

    def _read(self, entry: Entry[Extent], lease: Lease, start: int, end: int) -> Header:
        view, boundaries = lease.view, entry.place.boundaries
        self._segments.read(entry.place.pieces, view, start, end)
        header = Header.unpack(view[: boundaries[0]], key=entry.key, namespace=self._namespace)
        if header.boundaries != boundaries:
            raise Damaged("its frames are not where the index says")
        return header

    def _restore(self, entries: list[Entry[Extent]]) -> None:
        """Fill the index with what can be true, and find the free space between."""
        nobody = len(entries)
        taken = [(*piece, n) for n, entry in enumerate(entries) for piece in entry.place.pieces]
        taken += [(*piece, nobody) for piece in self._segments.missing()]
        taken.append((self.capacity, 1 << 62, nobody))
        # Where two overlap a record is missing: which of them is there now, nobody knows.
        wrong = set()
        end = last = 0
        for offset, nbytes, n in sorted(taken):
            if offset < end:
                wrong |= {last, n}
            if offset + nbytes > end:
                end, last = offset + nbytes, n
        wrong.discard(nobody)
        if wrong:
            log.warning("disk tier at %s: %d objects forgotten", self._folder, len(wrong))
        at = 0
        for offset, nbytes, n in sorted(taken):
            if n not in wrong:
                if offset > at:
                    self._space.give(at, offset - at)
                at = offset + nbytes
        right = [entry for n, entry in enumerate(entries) if n not in wrong]
        limit = self.index.expiry()
        for entry in right:
            entry.expires = min(entry.expires, limit)
        for entry in sorted(right, key=lambda entry: entry.expires):
            self.index.add(entry)

    def _room(self, key: bytes, nbytes: int) -> list[tuple[int, int]] | None:
        """Space for an object: what is free, else what can be added, else what can be evicted."""
        if nbytes > self.capacity:
            return None
        self.index.expect(key, nbytes)
        with self._changing:
            self._forget(self.index.expired())
            while True:
                with self.index.lock:
                    pieces = self._space.take_split(nbytes, _PIECES)
                if pieces is not None:
                    return pieces
                if self._grow(nbytes):
                    continue
                self._index_log.require_room()
                if not self._evict(key):
                    return None

    def _grow(self, nbytes: int) -> bool:
        fresh = self._segments.grow(nbytes, self._keep_free)
        if fresh is None:
            return False
        with self.index.lock:
            self._space.give(*fresh)
        return True

    def _evict(self, incoming: bytes) -> bool:
        entry = self.index.evict(incoming)
        if entry is None:
            return False
        try:
            self._index_log.delete([entry.key])
        except OSError:  # the put is refused: nothing was deleted for it
            self.index.add(entry)
            raise
        self._give(entry.place)
        self._counts.evicted += 1
        return True

    def _forget(self, entries: list[Entry[Extent]]) -> int:
        """Delete those entries that still exist; how many did."""
        gone = [entry for entry in entries if self.index.remove(entry)]
        keys = [entry.key for entry in gone]
        try:
            if gone:
                self._index_log.delete(keys)
        except OSError:  # it is written before their space can be another object's
            self._index_log.later(DROP, keys)
            raise
        finally:
            for entry in gone:
                self._give(entry.place)
        return len(gone)

    def _expel(self, entry: Entry[Extent], proof: Damaged) -> None:
        """Delete an entry on proof that its object is damaged."""
        with self._changing, suppress(OSError):  # its removal is written later
            self._forget([entry])

    def _show(self, header: Header, extent: Extent) -> bool:
        """Log and show what was written; False if another call has put it meanwhile."""
        entry = Entry(header.key, header.links, header.nbytes, extent, self.index.expiry())
        with self._changing:
            if self.index.get(entry.key) is not None:
                return False
            if (over := self.index.expired_entry(entry.key)) is not None:
                self._forget([over])
            self._index_log.put(entry)
            self.index.add(entry, header.text)
        return True

    def _give(self, extent: Extent) -> None:
        """Free the space of a deleted object, once its last reader is done."""
        with self.index.lock:
            extent.gone = True
            if not extent.readers:
                for piece in extent.pieces:
                    self._space.give(*piece)

    def _open_in(self, lock: FolderLock) -> None:
        direct = want_direct(self._folder, self._direct)
        self._segments = Segments(
            self._folder, lock.segment, self.capacity, direct=direct, file_io=self._file_io
        )
        self._index_log = IndexLog(self._folder)
        self._space = Space(self.capacity, empty=True)
        self._restore(self._index_log.load())

    def _save_index(self) -> None:
        if self._index_log.begun:  # else nothing was written, nor can be
            self._snapshot()

    def _close_files(self) -> None:
        self._index_log.close()
        self._segments.close()

    def _forget_all(self) -> None:
        for entry in list(self.index):
            self.index.remove(entry)

    def _snapshot(self) -> None:
        if not self._snapshotting.acquire(blocking=False):
            return
        try:
            with self._changing, self.index.lock:
                generation = self._index_log.begin_snapshot()
                entries = list(self.index)
            self._segments.sync()
            self._index_log.write_snapshot(generation, entries)
        except OSError as error:  # the older snapshot and all logs since are still there
            log.warning("disk tier at %s: no snapshot of its index: %s", self._folder, error)
        finally:
            self._snapshotting.release()

    @contextmanager
    def _reading(self, entry: Entry[Extent]) -> Iterator[bool]:
        """Whether the entry is there; its space is not used again inside."""
        extent = entry.place
        with self.index.lock:
            there = self.index.get(entry.key) is entry
            extent.readers += there
        try:
            yield there
        finally:
            with self.index.lock:
                extent.readers -= there
                if there and extent.gone:
                    self._give(extent)
