"""What a directory is: who of many workers holds which chunk, and how they are reached.

It is a hint. What it says may be out of date at any moment: a chunk that is gone is a miss for
whoever asks for it, and he reports it. So nothing here is kept for ever, and all of it is told anew
by the workers when a directory has lost it.

A worker joins, and from then on says at least once in each heartbeat that it lives: else it counts
as dead at once, and nothing it held is found any more. It has a number, from the epoch that `join`
gave it, and joins anew when its announcements have a gap, when it counted as dead, and when the
directory came back empty. What is known under its old number is then of nobody.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import anyio

from tierloom.stages.directory.shared.records import ChunkHolder, WorkerRecord, pack_changes
from tierloom.stages.errors import ConfigError, TierDown


class Member(NamedTuple):
    """A worker that lives."""

    epoch: int
    record: WorkerRecord


class Directory(ABC):
    """On one loop. The first call connects. Raises TierDown where it cannot answer now, in bounded
    time, ConfigError where it never will, InputError for input that no directory takes."""

    async def close(self) -> None:  # noqa: B027 (nothing to do is fine)
        """Release everything. Called once."""

    @abstractmethod
    async def join(self, worker: WorkerRecord, *, first: int = 0, last: int = 0) -> int:
        """The worker's epoch, greater than all before it. Its sequence is 0 then.

        `first`, `last`: epochs that this process was given the first and the last time. A process
        takes the name of one that joined before it did; that one's `join` raises ConfigError as
        long as the other lives."""

    @abstractmethod
    async def leave(self, epoch: int) -> None:
        """Nothing that this worker held is found any more."""

    @abstractmethod
    async def beat(self, epoch: int, sequence: int) -> bool:
        """The worker lives, and `sequence` is the last of its announcements that was taken. False:
        it must join anew."""

    @abstractmethod
    async def announce(self, epoch: int, sequence: int, changes: bytes) -> bool:
        """What a worker holds from now on (`pack_changes`), of 1,024 chunks at most, the last word
        on each; counts as a beat. `sequence`: 1 for its first call,
        1 more for the next. When a call raised, it is made again just as it was. False: there is a
        gap, or the worker counts as dead; it must join anew and announce all that it holds."""

    @abstractmethod
    async def find(self, names: Sequence[bytes]) -> list[tuple[ChunkHolder, ...]]:
        """Living holders of each chunk of the longest prefix that somebody has; `names` of
        consecutive chunks of a prompt (`chunk_name`)."""

    @abstractmethod
    async def report(self, name: bytes, holder: ChunkHolder) -> None:
        """This holder, as `find` named it, did not have the chunk: it is no longer named."""

    @abstractmethod
    async def workers(self, numbers: Sequence[int] = ()) -> dict[int, Member]:
        """Living workers by number; all, or those asked for. A holder that is not among them is
        gone. A number is one worker's as long as that lives and the directory is not lost, so
        answers are kept for seconds (`Roster`)."""

    @abstractmethod
    async def sweep(self, most: int = 2000) -> int:
        """Look at some chunks, about `most`, and forget holders that are dead; the next call goes
        on from there. Returns how many chunks were changed."""

    async def withdraw(self, epoch: int, sequence: int, names: Sequence[bytes]) -> bool:
        """`announce` that these are in no tier any more."""
        return await self.announce(epoch, sequence, pack_changes((name, 0) for name in names))


class Roster:
    """Who the numbers are that `find` names, asked for now and then. On one loop."""

    def __init__(
        self,
        directory: Directory,
        *,
        keep: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`keep`: seconds for which an answer holds; a directory that was lost gives numbers to
        others. `clock`: monotonic."""
        self._directory, self._keep, self._clock = directory, keep, clock
        self._known: dict[int, tuple[float, Member]] = {}

    async def members(self, found: Iterable[Sequence[ChunkHolder]]) -> dict[int, Member]:
        """Living workers among those that `find` named. Raises TierDown."""
        numbers = {holder.number for holders in set(map(tuple, found)) for holder in holders}
        now = self._clock()
        self._known = {n: known for n, known in self._known.items() if known[0] > now}
        if new := sorted(numbers - self._known.keys()):
            for number, member in (await self._directory.workers(new)).items():
                self._known[number] = now + self._keep, member
        return {n: self._known[n][1] for n in numbers if n in self._known}

    def forget(self, number: int) -> None:
        """It had nothing of what it was named for: who it is, is asked again."""
        self._known.pop(number, None)


def name_taken(worker: WorkerRecord) -> ConfigError:
    return ConfigError(
        f"directory: a process that began later calls itself {worker.name!r} too, so this one is "
        "not announced any more; give each engine an `instance` of its own"
    )


@contextmanager
def answered_within(seconds: float, who: str = "the directory") -> Iterator[None]:
    """Raises TierDown where a call takes longer, or fails by OSError."""
    try:
        with anyio.fail_after(seconds):
            yield
    except TimeoutError as error:
        raise TierDown(f"{who} did not answer within {seconds:g} s") from error
    except OSError as error:
        raise TierDown(f"{who} cannot be reached: {error}") from error
