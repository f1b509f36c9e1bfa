"""What a worker tells a directory, in the background: nobody waits for it, and it may be lost.

`note` takes a microsecond, on any thread. A task joins, announces what changed in batches, says
that the worker lives, and starts anew with all that is held when the directory has a gap or was
emptied; a directory that fails is left alone for a while, longer each time.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

import anyio

from tierloom.stages.directory.shared.contract import Directory
from tierloom.stages.directory.shared.records import CHANGE, NAME, WorkerRecord, pack_changes
from tierloom.stages.errors import ConfigError, InputError, TierDown

log = logging.getLogger(__name__)

_BATCH = 512  # chunks announced in one call
_PAUSE = 0.02  # seconds between two looks for changes
_GONE = 0.002  # the same where something went: until it is told, others ask for it
_SLOW = 0.02  # seconds for a batch, from which on the directory has enough to do
_UNTOLD = "the directory is not told what is kept here"
_LONGEST = 5.0  # seconds for which a directory that fails is left alone


class Announcer:
    """One for each worker."""

    def __init__(
        self,
        directory: Directory,
        worker: WorkerRecord,
        *,
        pace: float = 200_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`pace`: chunks announced in a second, at most, when all that is held is told anew.
        `clock`: monotonic, in seconds."""
        self.epoch = 0
        """Given by the directory; 0: not joined."""
        self.problem: ConfigError | None = None
        """Why the directory refuses this worker; it is asked again now and then."""
        self.snapshots = 0
        """How often all that is held was told."""
        self._directory, self._worker, self._clock, self._pace = directory, worker, clock, pace
        self._anew = False
        self._lock = threading.Lock()
        self._held: dict[bytes, int] = {}  # chunk: a bit for each tier
        self._changed = OrderedDict[bytes, None]()  # in the order in which it is to be told
        self._again: dict[bytes, int] = {}  # what is held, to be told anew: told last
        self._pending = b""  # changes that were sent, and perhaps not taken
        self._went = False  # something that is held no more, and that is not told yet
        self._doze: tuple[asyncio.Event, Callable[[], bool]] | None = None
        self._first = self._last = self._sequence = 0
        self._failures, self._rest, self._beat_at = 0, 0.0, 0.0

    def note(self, name: bytes, tier: int, kept: bool) -> None:
        """A chunk came to tier `tier` of the worker's record, or left it. Raises InputError."""
        if len(name) != NAME or not 0 <= tier < len(self._worker.tiers):
            raise InputError(f"chunk {name.hex()} in tier {tier} of {len(self._worker.tiers)}")
        with self._lock:
            was = self._held.get(name, 0)
            now = was | 1 << tier if kept else was & ~(1 << tier)
            if now == was:
                return
            if now:
                self._held[name] = now
            else:
                del self._held[name]
            self._changed[name] = None
            self._went = self._went or was > now
            if self._doze is not None and self._doze[1]():
                with suppress(RuntimeError):  # the loop is closed
                    self._loop.call_soon_threadsafe(self._doze[0].set)
                self._doze = None
            self._again.pop(name, None)

    def introduce(self, worker: WorkerRecord) -> None:
        """Another record of the same worker, with the same tiers: it joins anew. Any thread."""
        self._worker, self._anew = worker, True

    async def run(self) -> None:
        """Until it is cancelled."""
        self._loop = asyncio.get_running_loop()
        while True:
            try:
                pause = await self._step()
                self._failures, self.problem = 0, None
            except ConfigError as error:
                if self.problem is None:
                    log.error("%s: %s", _UNTOLD, error)  # noqa: TRY400 (no trace: it is a mistake)
                self.problem, pause = error, _LONGEST
            except Exception as error:  # whatever it is, engines go on
                if not self._failures:
                    log.warning("%s: %r", _UNTOLD, error)
                least = self._worker.heartbeat / 4  # joined it goes on to say that it lives
                pause = least if self.epoch else min(_LONGEST, least * 2**self._failures)
                self._failures = min(self._failures + 1, 16)
            await self._rest_for(pause)

    async def leave(self) -> None:
        """Nothing of this worker is found any more. After `run`; never raises for a directory that
        is down."""
        try:
            await self._directory.leave(self.epoch)
        except (TierDown, OSError) as error:
            log.info("the directory was not told that this worker leaves: %s", error)
        self.epoch = 0

    async def _rest_for(self, pause: float) -> None:
        """So many seconds; longer while nothing changes, and shorter where a chunk goes."""
        if pause != _PAUSE:  # more is to be told, or the directory to be left alone
            await anyio.sleep(pause)
            return
        await anyio.sleep(_GONE)
        await self._doze_until(lambda: bool(self._changed), self._worker.heartbeat / 4)
        await self._doze_until(lambda: self._went, pause - _GONE)

    async def _doze_until(self, woken: Callable[[], bool], most: float) -> None:
        """`most`: seconds."""
        doze = asyncio.Event()
        with self._lock:
            if woken():
                return
            self._doze = doze, woken
        try:
            with anyio.move_on_after(most):
                await doze.wait()
        finally:
            with self._lock:
                self._doze = None

    async def _step(self) -> float:
        """Do what is due; the seconds until something may be."""
        if self._anew or not self.epoch:
            self._anew = False
            await self._join()
        began, taken, pause = self._clock(), True, _PAUSE
        if began - self._beat_at >= self._worker.heartbeat / 2:  # a full server still takes it
            taken = await self._directory.beat(self.epoch, self._sequence)
            self._beat_at = began
            await self._directory.sweep()
        self._pending = self._pending or self._next()
        if taken and self._pending:
            taken = await self._directory.announce(self.epoch, self._sequence + 1, self._pending)
            told, self._pending = len(self._pending) // CHANGE, b""
            self._sequence, took = self._sequence + 1, self._clock() - began
            self._rest = min(1.0, 2 * self._rest + 0.01) if took > _SLOW else self._rest / 2
            pause = max(_PAUSE if told < _BATCH else 0.0, told / self._pace - took, self._rest)
        if not taken:  # a gap, or it came back empty: all anew, but not at once
            self.epoch, pause = 0, self._worker.heartbeat / 4
        return pause

    async def _join(self) -> None:
        epoch = await self._directory.join(self._worker, first=self._first, last=self._last)
        self.epoch = self._last = epoch
        self._first = self._first or epoch
        self._sequence, self._pending, self._beat_at = 0, b"", self._clock()
        self.snapshots += 1
        with self._lock:
            self._again = dict(self._held)
            self._changed.clear()

    def _next(self) -> bytes:
        """What is to be told next: what changed, and then what is told again."""
        with self._lock:
            self._went, count = False, min(_BATCH, len(self._changed))
            names = [self._changed.popitem(last=False)[0] for _ in range(count)]
            told = [(name, self._held.get(name, 0)) for name in names]
            more = min(_BATCH - count, len(self._again))
            told += [self._again.popitem() for _ in range(more)]
        return pack_changes(told)
