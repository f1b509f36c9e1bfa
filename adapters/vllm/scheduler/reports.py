"""What the workers report: what they are, what they hold, and how their loads went.

Nothing is looked up or saved before all workers have sent what they are (`cache` is None until
then), and all that they held when they began (`ready`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from tierloom.adapters.vllm.exchange.messages import (
    CacheEvent,
    WorkerInfo,
    WorkerReport,
    WorkerReports,
)
from tierloom.adapters.vllm.exchange.settings import Settings
from tierloom.adapters.vllm.scheduler.load_cost import LoadCost
from tierloom.adapters.vllm.scheduler.request import TrackedRequest
from tierloom.adapters.vllm.scheduler.saves import Saves
from tierloom.stages.directory.chunk_directory import ChunkDirectory
from tierloom.stages.kv.object import LINK

if TYPE_CHECKING:
    from tierloom.stages.directory.text_index import TextIndex

log = logging.getLogger("tierloom.vllm")

UNCONFIRMED_S = 60.0
"""Seconds after which a load within a step that no worker reports is presumed failed."""


class Cache(NamedTuple):
    """What all workers are, and what they hold."""

    info: WorkerInfo
    directory: ChunkDirectory
    texts: TextIndex | None
    """Finds text anywhere that the directory has; None: it is not kept by content."""


class Reports:
    """Used by the scheduler's thread alone."""

    def __init__(
        self, workers: int, hash_block: int, settings: Settings,
        requests: Mapping[str, TrackedRequest], saves: Saves | None, load_cost: LoadCost,
    ) -> None:  # fmt: skip
        self._workers, self._hash_block, self._settings = workers, hash_block, settings
        self._requests, self._saves, self._load_cost = requests, saves, load_cost
        self.off = ""
        """Why nothing is looked up or saved; empty: caching is on."""
        self.cache: Cache | None = None
        self.on_change: Callable[[bytes, bool, str], None] | None = None
        """Called with (key, loadable, tier) when that changes; for events."""
        self._infos: dict[int, WorkerInfo] = {}
        self._incomplete: set[int] = set()
        """Workers that have yet to report all that they held when they began."""
        self._early: list[tuple[int, CacheEvent]] = []
        """Events from before all workers had sent what they are."""
        self._answers: dict[str, dict[int, int]] = {}
        self._unconfirmed_loads: dict[str, set[int]] = {}
        """Requests that are loaded within a step, and the workers that have confirmed it."""
        self._presume_failed_at = 0.0

    @property
    def ready(self) -> bool:
        return self.cache is not None and not self._incomplete

    def add(self, reports: WorkerReports | None) -> None:
        """A step has ended; what the workers report, if anything."""
        for worker, report in sorted(reports.by_worker.items()) if reports else ():
            self._add(worker, report)

    def expect(self, request: str) -> None:
        """A load within a step is sent out: until all workers confirm it, saves wait."""
        self._unconfirmed_loads[request] = set()
        self._presume_failed_at = time.monotonic() + UNCONFIRMED_S

    def unconfirmed(self) -> bool:
        """The outcome of a load is unknown, so what is computed after it may be invalid."""
        late = time.monotonic() > self._presume_failed_at
        if self._saves is not None and self._unconfirmed_loads and late:
            self._unconfirmed_loads.clear()  # a worker stopped reporting
            self._saves.discard_pending()
        return bool(self._unconfirmed_loads)

    def forget(self, request: str) -> None:
        """A request has ended."""
        self._answers.pop(request, None)

    def _add(self, worker: int, report: WorkerReport) -> None:
        if report.info is not None:
            self._add_info(worker, report.info)
            if report.more:
                self._incomplete.add(worker)
        elif report.events and not report.more:
            self._incomplete.discard(worker)
        for event in report.events:
            self._add_event(worker, event)
        if self._saves is not None:
            self._saves.add_report(worker, report)
            if not self._unconfirmed_loads.keys().isdisjoint(report.failed):
                self._saves.discard_pending()
        for name, tokens in report.answers.items():
            if (p := self._requests.get(name)) is not None:
                answers = self._answers.setdefault(name, {})
                answers[worker] = tokens
                if len(answers) == self._workers:
                    p.answer = min(answers.values())
                    del self._answers[name]
        for name in report.loaded:
            if (confirmed := self._unconfirmed_loads.get(name)) is not None:
                confirmed.add(worker)
                if len(confirmed) == self._workers:
                    del self._unconfirmed_loads[name]
        for name in report.failed:
            if (p := self._requests.get(name)) is not None:
                p.failed = True
        self._load_cost.costs.update(report.costs)

    def _add_event(self, worker: int, event: CacheEvent) -> None:
        if self.cache is None:
            if not self.off:
                self._early.append((worker, event))
            return
        holder = worker * self.cache.info.groups + event.group
        changed = self.cache.directory.note(holder, event.tier, event.kept, event.links)
        if self.cache.texts is not None:
            if event.text is not None:
                self.cache.texts.add(event.links[-LINK:], event.text)
            elif changed and not changed[1]:
                self.cache.texts.remove(changed[0])
        if changed and self.on_change is not None:
            self.on_change(*changed, event.tier)

    def _add_info(self, worker: int, info: WorkerInfo) -> None:
        """All workers must be alike before anything is looked up."""
        self._infos[worker] = info
        self.off = self.off or info.off
        if len(self._infos) < self._workers or self.off:
            return
        first = WorkerInfo.of_all(self._infos)
        self.off = first.off
        if self._settings.keys == "engine" and first.grain != self._hash_block:
            self.off = f"keys: engine needs chunk.grain {self._hash_block}, got {first.grain}"
        if self.off:
            log.error("caching is off: %s", self.off)
        directory = ChunkDirectory(
            first.tiers, holders=self._workers * first.groups, chunk=first.chunk, grain=first.grain
        )
        texts = None
        if first.by_content:
            from tierloom.stages.directory.text_index import TextIndex

            texts = TextIndex(first.chunk, first.grain)
            texts.warm_up()
        self.cache = Cache(first, directory, texts)
        if self._saves is not None:
            self._saves.start(first, directory)
        early, self._early = self._early, []
        for whose, event in early:
            self._add_event(whose, event)
