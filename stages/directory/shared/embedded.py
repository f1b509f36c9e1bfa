"""embedded: the directory in this process, for one engine's neighbors or in a server of ours.

Nothing is written down: workers announce anew to one that was started again. A chunk costs one
entry of a dictionary, its name of 16 bytes, and where one worker alone has it nothing more.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import anyio.lowlevel

from tierloom.stages.directory.shared.contract import Directory, Member, Page
from tierloom.stages.directory.shared.records import (
    MOST_HOLDERS,
    NAME,
    NUMBERS,
    WHOLE_NAME,
    WORD,
    Announced,
    Announcement,
    Holder,
    WorkerRecord,
    epoch_of,
    holders_in,
    number_of,
    pack_changes,
    require_changes,
    require_names,
    turn_of,
    unpack_changes,
    word_of,
)
from tierloom.stages.errors import ConfigError

EVENTS = 64
"""Calls of `announce` by each worker that `events` goes back."""
_SLICE = 2000  # chunks that are looked at before others may run


@dataclass(slots=True)
class _Lives:
    """A worker that was alive when it was last looked at."""

    member: Member
    first: float
    """Its process' first epoch; infinite where it is new: who was there before it is older, and
    may have counted further in a directory that was lost."""
    until: float
    sequence: int = 0
    told: deque[tuple[int, bytes]] = field(default_factory=lambda: deque(maxlen=EVENTS))


class EmbeddedDirectory(Directory):
    """On the loop alone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: monotonic, in seconds."""
        self._clock = clock
        self._chunks: dict[bytes, bytes] = {}  # the first 16 bytes of a name: words of holders
        self._alone: dict[bytes, bytes] = {}  # the one copy of a word that chunks share
        self._lives: dict[int, _Lives] = {}
        self._turn = 0
        self._to_sweep: Iterator[bytes] = iter(())

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

    async def announce(self, epoch: int, sequence: int, changes: Sequence[Announcement]) -> bool:
        require_changes(changes)
        if not await self.beat(epoch, sequence - 1):
            return False
        lives, chunks = self._lives[number_of(epoch)], self._chunks
        if lives.sequence == sequence:
            return True
        number = number_of(epoch)
        single = [self._single(number, tiers) for tiers in range(16)]
        for name, tiers, _ in changes:
            short = name[:NAME]
            words = chunks.get(short)
            if words is None:
                if tiers:
                    chunks[short] = single[tiers]
            elif words != single[tiers]:
                self._replace(short, words, number, single[tiers] if tiers else b"")
        lives.sequence = sequence
        lives.told.append((sequence, pack_changes(changes)))
        return True

    async def find(self, names: Sequence[bytes]) -> list[tuple[Holder, ...]]:
        require_names(names)
        seen: dict[bytes, tuple[Holder, ...]] = {}
        found, chunks = [], self._chunks
        for name in names:
            words = chunks.get(name[:NAME])
            if words is None:
                break
            holders = seen.get(words)
            if holders is None:
                holders = seen[words] = holders_in(self._living_words(words))
            if not holders:
                break
            found.append(holders)
        return found

    async def report(self, name: bytes, holder: Holder) -> None:
        require_names([name])
        words = self._chunks.get(name[:NAME], b"")
        if holder in holders_in(words):
            self._replace(name[:NAME], words, holder.number, b"")

    async def events(self, after: Mapping[int, int]) -> dict[int, list[Announced] | None]:
        told: dict[int, list[Announced] | None] = {}
        for epoch, sequence in after.items():
            lives = self._find_living(epoch)
            told[epoch] = None
            if lives is not None and lives.sequence - len(lives.told) <= sequence <= lives.sequence:
                new = [Announced(n, unpack_changes(raw)) for n, raw in lives.told if n > sequence]
                told[epoch] = new
        return told

    async def snapshot(self, epoch: int) -> AsyncIterator[Page]:
        lives = self._find_living(epoch)
        if lives is None:
            return
        sequence, names = lives.sequence, list(self._chunks)
        for at in range(0, len(names), _SLICE):
            chunks = []
            for name in names[at : at + _SLICE]:
                for number, tiers in holders_in(self._chunks.get(name, b"")):
                    if number == number_of(epoch):
                        chunks.append((name.ljust(WHOLE_NAME, b"\0"), tiers))
            yield Page(sequence, chunks)
            await anyio.lowlevel.checkpoint()

    async def workers(self, numbers: Sequence[int] = ()) -> dict[int, Member]:
        now = self._clock()
        living = {n: each.member for n, each in self._lives.items() if each.until > now}
        return {n: living[n] for n in numbers if n in living} if numbers else living

    async def sweep(self, most: int = 2000) -> int:
        self._bury()
        changed = 0
        for _ in range(most):
            name = next(self._to_sweep, None)
            if name is None:
                self._to_sweep = iter(list(self._chunks))
                self._alone = {w: w for w in self._alone if holders_in(w)[0].number in self._lives}
                break
            words = self._chunks.get(name, b"")
            if words and self._living_words(words) != words:
                self._replace(name, words, -1, b"")
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

    def _single(self, number: int, tiers: int) -> bytes:
        word = word_of(number, tiers)
        return self._alone.setdefault(word, word)

    def _living_words(self, words: bytes) -> bytes:
        """Of these words, those of workers that live."""
        now, kept = self._clock(), b""
        for at in range(0, len(words), WORD):
            word = words[at : at + WORD]
            lives = self._lives.get(holders_in(word)[0].number)
            if lives is not None and lives.until > now:
                kept += word
        return kept

    def _replace(self, name: bytes, words: bytes, number: int, word: bytes) -> None:
        """Forget what a worker held of a chunk, and who is dead; then add `word`."""
        kept = self._living_words(words)
        split = [kept[i : i + WORD] for i in range(0, len(kept), WORD)]
        others = [each for each in split if holders_in(each)[0].number != number]
        made = b"".join(others[-MOST_HOLDERS + bool(word) :]) + word
        if made:
            self._chunks[name] = self._alone.setdefault(made, made) if len(made) == WORD else made
        else:
            del self._chunks[name]


def name_taken(worker: WorkerRecord) -> ConfigError:
    return ConfigError(
        f"directory: a process that began later calls itself {worker.name!r} too, so this one is "
        "not announced any more; give each engine an `instance` of its own"
    )
