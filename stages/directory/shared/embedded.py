"""embedded: the directory in this process, which hosts it for others, too (`hosted.py`).

Nothing is written down: workers announce anew to one that was started again. A chunk costs a slot
of a table, and where several have it the bytes of their words.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tierloom.stages.directory.shared.chunk_table import ChunkTable
from tierloom.stages.directory.shared.contract import Directory, Member, name_taken
from tierloom.stages.directory.shared.records import (
    CHANGE,
    MOST_HOLDERS,
    MOST_TIERS,
    NAME,
    NUMBERS,
    WORD,
    ChunkHolder,
    WorkerRecord,
    epoch_of,
    holders_in,
    number_of,
    require_changes,
    require_names,
    turn_of,
    word_of,
)
from tierloom.stages.errors import InputError

_SEVERAL = 1 << 24  # from here on a number is no word
_MOST_WORKERS = 1 << 14
_SWEEP_EVERY = 1.0  # seconds between two sweeps, whoever makes them


@dataclass(slots=True)
class _Lives:
    """A worker that was alive when it was last looked at."""

    member: Member
    first: float
    """Its process' first epoch; infinite where it is new: who was there before it is older, and
    may have counted further in a directory that was lost."""
    until: float
    sequence: int = 0


class EmbeddedDirectory(Directory):
    """On the loop alone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: monotonic, in seconds."""
        self._clock = clock
        self._chunks = ChunkTable()  # to the word of the one holder, or _SEVERAL + where words are
        self._several: list[bytes] = []
        self._free: list[int] = []
        self._lives: dict[int, _Lives] = {}
        self._turn = self._swept = 0
        self._sweep_due = -math.inf

    @classmethod
    def warm(cls) -> EmbeddedDirectory:
        """One whose first call compiles nothing."""
        ChunkTable.warm_up()
        return cls()

    def __len__(self) -> int:
        return len(self._chunks)

    async def join(self, worker: WorkerRecord, *, first: int = 0, last: int = 0) -> int:
        self._bury()
        for number, lives in list(self._lives.items()):
            if lives.member.record.name != worker.name:
                continue
            if lives.member.record.process != worker.process and 0 < first <= lives.first:
                raise name_taken(worker)
            del self._lives[number]
        if len(self._lives) >= _MOST_WORKERS:
            raise InputError(f"a directory of {_MOST_WORKERS} workers takes no more")
        self._turn = max(self._turn, turn_of(last)) + 1
        while self._turn % NUMBERS in self._lives:
            self._turn += 1
        epoch, until = epoch_of(self._turn, worker), self._clock() + 2 * worker.heartbeat
        self._lives[number_of(epoch)] = _Lives(Member(epoch, worker), first or math.inf, until)
        return epoch

    async def leave(self, epoch: int) -> None:
        if self._find_living(epoch) is not None:
            del self._lives[number_of(epoch)]

    async def beat(self, epoch: int, sequence: int) -> bool:
        lives = self._find_living(epoch)
        if lives is None or not sequence <= lives.sequence <= sequence + 1:
            return False
        lives.until = self._clock() + 2 * lives.member.record.heartbeat
        return True

    async def announce(self, epoch: int, sequence: int, changes: bytes) -> bool:
        require_changes(changes)
        if not await self.beat(epoch, sequence - 1):
            return False
        number, lives = number_of(epoch), self._lives[number_of(epoch)]
        if lives.sequence == sequence:
            return True
        held = {changes[i : i + NAME]: changes[i + NAME] for i in range(0, len(changes), CHANGE)}
        tiers = np.frombuffer(bytes(held.values()), np.uint8)
        new = np.where(tiers, np.uint32(number << MOST_TIERS) | tiers, 0).astype(np.uint32)
        old = self._chunks.add(b"".join(held), new)
        names = list(held)
        for i in np.flatnonzero((old != 0) & (old != new)).tolist():
            word = word_of(number, held[names[i]]) if held[names[i]] else b""
            self._replace(names[i], int(old[i]), number, word)
        lives.sequence = sequence
        return True

    async def find(self, names: Sequence[bytes]) -> list[tuple[ChunkHolder, ...]]:
        require_names(names)
        found: list[tuple[ChunkHolder, ...]] = []
        seen: dict[bytes, tuple[ChunkHolder, ...]] = {}
        last, holders = 0, tuple[ChunkHolder, ...]()
        for value in self._chunks.find(b"".join(names)):
            if value != last:
                words = self._words(value)
                if words not in seen:
                    seen[words] = holders_in(self._living_words(words))
                last, holders = value, seen[words]
                if not holders:
                    break
            found.append(holders)
        return found

    async def report(self, name: bytes, holder: ChunkHolder) -> None:
        require_names([name])
        for value in self._chunks.find(name):
            if holder in holders_in(self._words(value)):
                self._replace(name, value, holder.number, b"")

    async def workers(self, numbers: Sequence[int] = ()) -> dict[int, Member]:
        now = self._clock()
        living = {n: each.member for n, each in self._lives.items() if each.until > now}
        return {n: living[n] for n in numbers if n in living} if numbers else living

    async def sweep(self, most: int = 2000) -> int:
        if self._clock() < self._sweep_due:
            return 0
        self._sweep_due = self._clock() + _SWEEP_EVERY
        self._bury()
        changed, begin = 0, self._swept
        self._swept = begin + most if begin + most < self._chunks.slots else 0
        for name in self._chunks.names(begin, begin + most):
            (value,) = self._chunks.find(name)
            words = self._words(value)
            if self._living_words(words) != words:
                self._replace(name, value, -1, b"")
                changed += 1
        return changed

    def _find_living(self, epoch: int) -> _Lives | None:
        lives = self._lives.get(number_of(epoch))
        if lives is None or lives.member.epoch != epoch or lives.until <= self._clock():
            return None
        return lives

    def _bury(self) -> None:
        now = self._clock()
        self._lives = {n: lives for n, lives in self._lives.items() if lives.until > now}

    def _words(self, value: int) -> bytes:
        return value.to_bytes(WORD, "big") if value < _SEVERAL else self._several[value - _SEVERAL]

    def _living_words(self, words: bytes) -> bytes:
        """Of these words, those of workers that live."""
        now, kept = self._clock(), b""
        for at in range(0, len(words), WORD):
            word = words[at : at + WORD]
            lives = self._lives.get(holders_in(word)[0].number)
            if lives is not None and lives.until > now:
                kept += word
        return kept

    def _replace(self, name: bytes, value: int, number: int, word: bytes) -> None:
        """Forget what a worker held of a chunk, and who is dead; then add `word`. `value`: what the
        chunk has now."""
        kept = self._living_words(self._words(value))
        split = [kept[i : i + WORD] for i in range(0, len(kept), WORD)]
        others = [each for each in split if holders_in(each)[0].number != number]
        words = b"".join(others[-MOST_HOLDERS + bool(word) :]) + word
        if value >= _SEVERAL:
            self._free.append(value - _SEVERAL)
        made = int.from_bytes(words, "big")
        if len(words) > WORD:
            if not self._free:
                self._free.append(len(self._several))
                self._several.append(b"")
            made = _SEVERAL + self._free.pop()
            self._several[made - _SEVERAL] = words
        self._chunks.replace(name, made)
