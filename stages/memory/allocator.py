"""Who gets which bytes of a slab: best fit over holes binned by exact size, neighbors merged.

One allocator serves the arena (bytes of memory) and the disk tier (bytes of its segments). Sizes
are whole pages, so the slots of equal objects are recycled exactly, and what differs in size (a
prompt's short tail) is merged again when it goes: nothing calcifies in a class that nobody asks for
any more.
"""

from __future__ import annotations

from bisect import bisect_left, insort

PAGE = 4096
"""Bytes: what O_DIRECT, mappings and frames are aligned to."""


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to a page."""
    return -(-nbytes // PAGE) * PAGE


class Space:
    """Offsets 0 .. `total`, handed out in pages. Not thread-safe; owns no memory."""

    def __init__(self, total: int, *, empty: bool = False) -> None:
        """`empty`: begin with nothing free; what there is comes by `give`."""
        self.total = total // PAGE * PAGE
        self.free_bytes = 0
        self._by_size: list[tuple[int, int]] = []  # (size, offset), sorted
        self._at: dict[int, int] = {}  # offset -> size
        self._ends: dict[int, int] = {}  # end -> offset
        if self.total and not empty:
            self._insert(0, self.total)

    @property
    def used(self) -> int:
        return self.total - self.free_bytes

    @property
    def largest(self) -> int:
        """The longest piece that could be taken now."""
        return self._by_size[-1][0] if self._by_size else 0

    def take(self, nbytes: int) -> int | None:
        """An offset for `nbytes`, rounded up to pages; None when no hole is long enough."""
        need = aligned(nbytes)
        i = bisect_left(self._by_size, (need, -1))
        if i == len(self._by_size):
            return None
        size, offset = self._by_size[i]
        self._remove(offset, size)
        if size > need:
            self._insert(offset + need, size - need)
        return offset

    def take_split(self, nbytes: int, pieces: int) -> list[tuple[int, int]] | None:
        """(offset, bytes) of one hole, or of up to `pieces` holes where no single one is enough."""
        whole = self.take(nbytes)
        if whole is not None:
            return [(whole, aligned(nbytes))]
        left = aligned(nbytes)
        if sum(size for size, _ in self._by_size[-pieces:]) < left:
            return None
        taken = []
        while left:
            size = min(left, self.largest)
            offset = self.take(size)
            assert offset is not None
            taken.append((offset, size))
            left -= size
        return taken

    def give(self, offset: int, nbytes: int) -> None:
        """Give a piece back; it merges with free neighbors."""
        size = aligned(nbytes)
        after = self._at.get(offset + size)
        if after is not None:
            self._remove(offset + size, after)
            size += after
        before = self._ends.get(offset)
        if before is not None:
            length = self._at[before]
            self._remove(before, length)
            offset, size = before, size + length
        self._insert(offset, size)

    def _insert(self, offset: int, size: int) -> None:
        insort(self._by_size, (size, offset))
        self._at[offset] = size
        self._ends[offset + size] = offset
        self.free_bytes += size

    def _remove(self, offset: int, size: int) -> None:
        del self._by_size[bisect_left(self._by_size, (size, offset))]
        del self._at[offset]
        del self._ends[offset + size]
        self.free_bytes -= size
