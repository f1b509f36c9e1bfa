"""What to save of each request, step by step, and until when its blocks are needed.

A chunk is saved in the step that completes it, and the rest of a prompt in the step that completes
the prompt. Nothing is saved that is stored already, or that is being saved. If a load that runs
within a step fails, what is computed after it is invalid: while the outcome of one is unconfirmed,
saves wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from vllm.v1.request import RequestStatus

from tierloom.adapters.vllm.exchange.identity import drafted
from tierloom.adapters.vllm.exchange.messages import Save, WorkerInfo, WorkerReport, traceparent
from tierloom.adapters.vllm.exchange.settings import Settings
from tierloom.adapters.vllm.scheduler.request import TrackedRequest
from tierloom.stages.directory.chunk_directory import ChunkDirectory
from tierloom.stages.kv.block_table import BlockTable
from tierloom.stages.kv.prefix import Chain


class SaveJob(NamedTuple):
    """A save on its way through the workers."""

    tracked: TrackedRequest
    keys: list[bytes]
    captured: set[int]
    """Workers that have read the blocks."""
    ended: set[int]


class Saves:
    """Used by the scheduler's thread alone."""

    def __init__(self, vllm_config: Any, groups: list[int], settings: Settings) -> None:
        """`groups`: tokens of a block in each KV group's tables."""
        self._drafted = drafted(vllm_config)
        workers = vllm_config.parallel_config.world_size
        self.jobs: dict[int, SaveJob] = {}
        self.on_save: Callable[[Any, int, int, list[bytes]], None] | None = None
        """Called with (request, first token, one past the last, keys) when a save is planned."""
        self._groups, self._workers, self._settings = groups, workers, settings
        self._info: WorkerInfo | None = None
        self._directory: ChunkDirectory | None = None
        self._waiting: list[Save] = []
        """Planned, and not sent out yet."""
        self._number = 0
        self.epoch = 0
        """Cache resets so far."""
        self._promised: dict[bytes, int] = {}
        """Keys that are being saved now, to the job that does it."""

    def start(self, info: WorkerInfo, directory: ChunkDirectory) -> None:
        """The workers are ready."""
        self._info, self._directory = info, directory

    def promised(self, chain: Chain, known: int) -> int:
        """How far beyond the first `known` tokens the next chunk is being saved now, in tokens of
        the prompt; 0: it is not."""
        assert self._info is not None
        chunk, grain = self._info.chunk, self._info.grain
        for i in range((known // chunk + 1) * chunk // grain, known // grain, -1):
            if i <= len(chain.links) and chain.links[i - 1] in self._promised:
                return i * grain
        return 0

    def plan(
        self,
        output: Any,
        requests: Mapping[str, TrackedRequest],
        may: Callable[[TrackedRequest], bool],
        *,
        unconfirmed: bool,
    ) -> list[Save]:
        """What this step completes, and what was left to save before. With `unconfirmed` loads all
        of it waits: the KV may turn out to be invalid."""
        if self._drafted:
            self._undrafted(output, requests)
        for name, tokens in output.num_scheduled_tokens.items():
            p = requests.get(name)
            if p is not None:
                p.renew()
            if p is None or (p.prompt_saved and not self._settings.save_decode):
                continue
            prompt, before = p.request.num_prompt_tokens, p.request.num_computed_tokens
            known = before + tokens
            if known >= prompt:  # of what is generated, this step's tokens are not certain yet
                known = prompt
                if self._settings.save_decode:
                    known = max(known, min(before, p.request.num_tokens - 1))
            tail = known >= prompt and not p.prompt_saved
            if (tail or self._completes(p, known)) and may(p):
                blocks = output.kv_connector_block_state.get_block_ids(name)
                self._save(p, min(known, p.most), blocks, tail=tail)
                p.prompt_saved = p.prompt_saved or tail
        for save in self._waiting.copy():  # blocks that were taken away cannot be read any more
            if _lost_blocks(self.jobs[save.job].tracked.request, output):
                self._waiting.remove(save)
                self._cancel(save.job)
        if unconfirmed:
            return []
        out, self._waiting = self._waiting, []
        return out

    def discard_pending(self) -> None:
        """A load failed within a step: nothing that waits may be stored. It is computed again, and
        then saved."""
        waiting, self._waiting = self._waiting, []
        for save in waiting:
            self._cancel(save.job)

    def _undrafted(self, output: Any, requests: Mapping[str, TrackedRequest]) -> None:
        """One request that is too long for the draft model keeps it from running in the whole step:
        what is computed in it lacks the draft's KV, and is not saved."""
        steps = output.num_scheduled_tokens
        mine = [(p, n) for name, n in steps.items() if (p := requests.get(name)) is not None]
        longest = max((p.request.num_computed_tokens + n for p, n in mine), default=0)
        if longest > self._drafted or not getattr(output, "num_spec_tokens_to_schedule", 1):
            for p, _ in mine:
                p.drafted = min(p.drafted, p.request.num_computed_tokens)

    def forget(self, epoch: int) -> None:
        """The cache was reset: nothing that was planned before may be stored either."""
        self.epoch = epoch
        self.discard_pending()

    def under_way(self, keys: Iterable[bytes]) -> bool:
        """One of these is being saved, by whichever request."""
        return not self._promised.keys().isdisjoint(keys)

    def is_pending(self, request: str) -> bool:
        """A save of this request has not been sent out yet."""
        return any(save.request == request for save in self._waiting)

    def finish(self, p: TrackedRequest, blocks: tuple[list[int], ...], may: bool) -> bool:
        """A request has ended. True: its blocks are still needed."""
        if self._settings.save_decode and may and p.prompt_saved:
            known = min(p.request.num_computed_tokens, p.request.num_tokens - 1, p.most)
            self._save(p, known, blocks, tail=True)
        return bool(p.jobs)

    def fenced(self, output: Any) -> list[int]:
        """Jobs whose blocks were taken from their request, and may be overwritten."""
        return [
            number
            for number, job in self.jobs.items()
            if number in job.tracked.jobs and _lost_blocks(job.tracked.request, output)
        ]

    def add_report(self, worker: int, report: WorkerReport) -> None:
        """A worker has read blocks, or has finished a job."""
        for number in report.captured:
            if (job := self.jobs.get(number)) is not None:
                job.captured.add(worker)
                if len(job.captured) == self._workers:
                    job.tracked.jobs.discard(number)
        for number in report.ended:
            if (job := self.jobs.get(number)) is not None:
                job.ended.add(worker)
                if len(job.ended) == self._workers:
                    self._forget(number, job)

    def _cancel(self, number: int) -> None:
        job = self.jobs[number]
        job.tracked.jobs.discard(number)
        job.tracked.saved, job.tracked.prompt_saved = 0, False
        self._forget(number, job)

    def _forget(self, number: int, job: SaveJob) -> None:
        del self.jobs[number]
        for key in job.keys:
            if self._promised.get(key) == number:
                del self._promised[key]

    def _completes(self, p: TrackedRequest, known: int) -> bool:
        """There is a whole chunk that was not considered yet."""
        return self._info is not None and known - p.saved >= self._info.chunk

    def _save(
        self, p: TrackedRequest, known: int, blocks: tuple[list[int], ...] | None, *, tail: bool
    ) -> None:
        """Plan to save what of the first `known` tokens is not stored: whole chunks, and with
        `tail` the rest."""
        assert self._info is not None
        chunk, grain, unit = self._info.chunk, self._info.grain, self._info.unit
        end = known // unit * unit if tail else known // chunk * chunk
        links = p.links(self._settings.keys).links
        first, last = p.saved // chunk, -(-end // chunk)
        p.saved = max(p.saved, known // chunk * chunk)
        keys = [links[min((i + 1) * chunk, end) // grain - 1] for i in range(first, last)]
        while keys and self._is_stored(keys[0]):
            first, keys = first + 1, keys[1:]
        if not keys or blocks is None:
            return
        tables = tuple(
            BlockTable.cut(ids, size, first * chunk, end)
            for ids, size in zip(blocks, self._groups, strict=True)
        )
        if not all(all(t.blocks) for t in tables):  # block 0: left its window, and was freed
            return
        self._number += 1
        self.jobs[self._number] = SaveJob(p, keys, set(), set())
        p.jobs.add(self._number)
        exact = max(0, p.exact - first * chunk)
        named = keys[: exact // chunk] if exact < end - first * chunk else keys
        self._promised.update(dict.fromkeys(named, self._number))
        assert p.chain is not None
        span = p.chain.span(first * chunk // grain, end // grain)
        ids = p.ids(first * chunk, end) if self._info.by_content else b""
        name, trace = p.request.request_id, traceparent(p.request)
        self._waiting.append(Save(self._number, name, span, tables, self.epoch, ids, exact, trace))
        if self.on_save is not None:
            self.on_save(p.request, first * chunk, end, keys)

    def _is_stored(self, key: bytes) -> bool:
        assert self._directory is not None
        return key in self._promised or self._directory.has(key)


def _lost_blocks(request: Any, output: Any) -> bool:
    """A request was preempted; after a reset of the cache it may be running again already."""
    again = getattr(output, "preempted_req_ids", None) or ()
    return request.status == RequestStatus.PREEMPTED or request.request_id in again
