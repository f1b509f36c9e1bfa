"""Finds kept text anywhere in a prompt: grains of every chunk, by fingerprint.

Chunks are cut from the beginning of the prompt that they came with, so a passage is seldom whole
chunks of it. Each grain of a chunk therefore has a fingerprint of its own, and the prompt's are
looked up at every offset. What is found must still be compared token by token: two texts may have
one fingerprint, and no tokens are kept here.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from tierloom.stages.kv.text import Excerpt, Run, Text

_LOAD, _GROWTH, _LEAST = 0.85, 17 / 16, 1024
_SLICE = 1 << 14
"""Slots of a table that grows which one `add` moves."""
_NOBODY = -1


class TextIndex:
    """Kept chunks by what they say. Thread-safe: one lock, and kernels hold no GIL."""

    def __init__(self, chunk: int, grain: int, *, base: int | None = None) -> None:
        """`chunk`, `grain`: tokens. `base`: of the fingerprints; not given, it is a secret of this
        process, so that nobody can write a text that has another's fingerprint."""
        if grain < 1 or chunk < grain or chunk % grain:
            raise ValueError(f"a chunk of {chunk} tokens is not made of whole grains of {grain}")
        from tierloom.stages.directory import cover, fingerprints

        self._code, self._cover = fingerprints, cover
        self._grain, self._per = grain, chunk // grain + 1
        self._lock = threading.Lock()
        self._secret = secrets.token_bytes(16) if base is None else base.to_bytes(16, "little")
        if base is None:
            base = int.from_bytes(self._digest(b"base"), "little")
        self._base = np.uint64(base % ((1 << 61) - 1))
        self._key_salt = int.from_bytes(self._digest(b"keys"), "little")
        self._larger: tuple[npt.NDArray[np.uint64], int] | None
        """The table that a full one grows into, and its size; filled up to slot `_moved`."""
        self.clear()

    def warm_up(self) -> None:
        """Compile the kernels, or load them from numba's cache, before a request waits for it."""
        ids, nobody = np.zeros(self._grain, np.int32), bytes(32)
        with self._lock:
            if self._larger is None:
                self._larger, self._moved = self._empty_table(int(self._size * _GROWTH)), 0
        self.add(nobody, Text(ids, 0, nobody, nobody, nobody))
        self.find(ids, nobody, least=1)
        self.remove(nobody)

    def clear(self) -> None:
        with self._lock:
            self._keys: list[bytes | None] = []
            self._free: list[int] = []
            self._entries = self._arrivals = 0
            self._table, self._size = self._empty_table(_LEAST)
            self._larger, self._moved = None, 0
            self._tops = np.zeros(0, np.uint32)
            self._chunks = np.zeros(0, self._cover.CHUNK)

    def __len__(self) -> int:
        with self._lock:
            return len(self._keys) - len(self._free)

    def __contains__(self, key: bytes) -> bool:
        with self._lock:
            return self._of(key) != _NOBODY

    @property
    def nbytes(self) -> int:
        """Of all arrays, and of the lists' references; keys are the caller's."""
        lists = 8 * (len(self._keys) + len(self._free))
        larger = self._larger[0].nbytes if self._larger is not None else 0
        return self._table.nbytes + larger + self._tops.nbytes + self._chunks.nbytes + lists

    def add(self, key: bytes, text: Text) -> None:
        """A chunk came. Only its whole grains are found; one that is known already, or has none, or
        comes when there are as many as fit (33 million grains), changes nothing."""
        grains = len(text.ids) // self._grain
        if not 0 < grains < self._per:
            return
        ids = np.ascontiguousarray(text.ids[: grains * self._grain], np.int32)
        prints = self._windows(ids, text.root, self._grain)
        with self._lock:
            if self._of(key) != _NOBODY:
                return
            c = self._free[-1] if self._free else len(self._keys)
            first = c * self._per
            if first + self._per > self._code.MOST:
                return
            self._room_for(c)
            if self._free:
                self._free.pop()
            else:
                self._keys.append(None)
            self._keys[c] = key
            self._arrivals = self._arrivals + 1 & 0xFFFFFFFF
            parent, opening = self._name(text.parent) >> 32, self._name(text.opening) >> 32
            self._chunks[c] = (self._arrivals, parent, opening, text.position, len(text.ids))
            self._put(first, prints)
            self._put(first + self._per - 1, np.array([self._name(key)], np.uint64))

    def remove(self, key: bytes) -> None:
        """A chunk went; its identity is given to the next one."""
        with self._lock:
            if (c := self._of(key)) == _NOBODY:
                return
            first = c * self._per
            grains = int(self._chunks["tokens"][c]) // self._grain
            for start, n in ((first, grains), (first + self._per - 1, 1)):
                table, filled, larger = self._tables()
                self._entries -= self._code.erase(*table, self._tops, start, n, filled)
                for again in larger:
                    self._code.erase(*again, self._tops, start, n, (filled[0], self._moved))
            self._keys[c] = None
            self._free.append(c)

    def find(
        self,
        tokens: npt.NDArray[np.int32],
        root: bytes,
        *,
        start: int = 0,
        least: int = 64,
        opening: bytes = b"",
        before: bytes = b"",
    ) -> list[Run]:
        """Kept text in a prompt from token `start` on: runs of at least `least` tokens in rising
        order, none over another. tokens: int32 [n].

        `root`: the link before the prompt's first token; only what was captured under it is found.
        `opening`: the prompt's own, as in `Text`. `before`: the key of the chunk that token
        `start` - 1 was found in by its exact prefix; what goes on from there has no seam. The runs
        are those with most tokens, each less `least` - 1. Of chunks with the same text are taken:
        what continues the run; else what was captured after `opening`, if at most that many tokens
        are lost by it; else what covers most; else what did not begin its prompt; else the newest.
        """
        if least < 1 or start < 0:
            raise ValueError(f"least is {least} and start is {start}; they are 1 and 0 at least")
        grain, per = self._grain, self._per
        before = root if start == 0 else before
        if len(tokens) - start < max(grain, least):
            return []
        prints = self._windows(np.ascontiguousarray(tokens[start:], np.int32), root, 1)
        with self._lock:
            size = np.uint64(self._size)
            first = np.empty(len(prints) + 1, np.int32)
            ids = np.empty(self._code.SAME * len(prints), np.int32)
            if not self._cover.hits_of(prints, self._table, size, per, first, ids):
                return []
            wanted = (
                self._name(opening) >> 32 if opening and opening != root else _NOBODY,
                self._next_grain(before, start),
                self._name(before) >> 32 if before else _NOBODY,
                start,
            )
            rows = self._cover.cover(
                prints, first, ids, self._tops, self._chunks, (per, grain, least), wanted
            )
            return self._runs(rows.tolist(), start, wanted)

    def _runs(
        self, rows: list[list[int]], start: int, wanted: tuple[int, int, int, int]
    ) -> list[Run]:
        grain, per, positions = self._grain, self._per, self._chunks["position"]
        runs: list[list[Excerpt]] = []
        seams: list[bool] = []
        for offset, grains, ident, new in rows:
            c, g = divmod(ident, per)
            key, position = self._keys[c], int(positions[c])
            assert key is not None
            part = Excerpt(start + offset, grains * grain, key, g * grain, position + g * grain)
            if new:
                runs.append([part])
                args = self._chunks, per, wanted
                seams.append(offset > 0 or not self._cover.joins(ident, offset, *args))
            elif runs[-1][-1].key == key:
                last = runs[-1][-1]
                runs[-1][-1] = last._replace(tokens=last.tokens + part.tokens)
            else:
                runs[-1].append(part)
        return [Run(tuple(run), seam) for run, seam in zip(runs, seams, strict=True)]

    def _next_grain(self, key: bytes, start: int) -> int:
        """The grain that token `start` begins in the chunk `key`, which was met in its place."""
        if not key or (c := self._of(key)) == _NOBODY:
            return _NOBODY
        inside = start - int(self._chunks["position"][c])
        if inside < 0 or inside % self._grain or inside >= int(self._chunks["tokens"][c]):
            return _NOBODY
        return c * self._per + inside // self._grain

    def _put(self, first: int, prints: npt.NDArray[np.uint64]) -> None:
        self._tops[first : first + len(prints)] = prints >> np.uint64(32)
        what = prints, first, self._per, self._chunks["age"]
        table, filled, larger = self._tables()
        self._entries += self._code.insert(*table, *what, filled)
        for again in larger:
            self._code.insert(*again, *what, (filled[0], self._moved))

    def _tables(self) -> tuple[Any, Any, list[Any]]:
        """The table and its size, `filled` for all of it, and the one that it grows into, if any;
        as kernels take them."""
        size = np.uint64(self._size)
        larger = [] if self._larger is None else [(self._larger[0], np.uint64(self._larger[1]))]
        return (self._table, size), (size, self._size), larger

    def _room_for(self, chunk: int) -> None:
        if chunk >= len(self._chunks):
            n = max(_LEAST, int(len(self._chunks) * _GROWTH))
            # In place: a large block is moved by its page table, not copied. Nobody else has views.
            self._chunks.resize(n, refcheck=False)
            self._tops.resize(n * self._per, refcheck=False)
        full = self._entries + self._per > _LOAD * self._size
        if self._larger is None and (full or self._table[-self._per - 2]):
            self._larger, self._moved = self._empty_table(int(self._size * _GROWTH)), 0
        if self._larger is not None:
            self._grow_table(_SLICE)
            if self._larger is not None and self._table[-self._per - 2]:
                self._grow_table(len(self._table))

    def _empty_table(self, size: int) -> tuple[npt.NDArray[np.uint64], int]:
        size = max(size, _LEAST, 2 * self._per)
        # What lies after the last place keeps clusters from running off the end.
        return np.zeros(size + size // 64 + 2 * self._per + 64, np.uint64), size

    def _grow_table(self, slots: int) -> None:
        """Go on with growing; once all is in the larger table, that is the one."""
        assert self._larger is not None
        (new, size), old = self._larger, (self._table, np.uint64(self._size))
        self._moved = self._code.move_entries(*old, new, np.uint64(size), self._moved, slots)
        if self._moved == len(self._table):
            self._table, self._size, self._larger = new, size, None

    def _of(self, key: bytes) -> int:
        name = np.uint64(self._name(key))
        found = self._code.holders(self._table, np.uint64(self._size), name, self._per)
        return next((c for c in found if self._keys[c] == key), _NOBODY)

    def _windows(self, tokens: npt.NDArray[np.int32], root: bytes, step: int) -> Any:
        salt = np.uint64(int.from_bytes(self._digest(root), "little"))
        return self._code.windows(tokens, self._grain, step, self._base, salt)

    def _digest(self, what: bytes) -> bytes:
        return hashlib.sha256(self._secret + what).digest()[:8]

    def _name(self, key: bytes) -> int:
        """64 bits of a key that nobody outside can predict."""
        return int(self._code.mixed(np.uint64(int.from_bytes(key[:8], "little") ^ self._key_salt)))
