"""What to save of each request, step by step, and until when its blocks are needed.

A chunk is saved in the step that completes it, and what is left over of a prompt in the step that
completes the prompt. Nothing is saved that is kept already, or that is being saved. A load that
runs within a step spoils, when it fails, what is computed behind it: as long as the outcome of one
is not known, saves wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vllm.v1.request import RequestStatus

from tierloom.adapters.vllm.exchange.identity import drafted
from tierloom.adapters.vllm.exchange.messages import Hello, Save, Told
from tierloom.adapters.vllm.exchange.settings import Settings
from tierloom.adapters.vllm.scheduler.request import Passage
from tierloom.stages.directory.chunk_directory import ChunkDirectory
from tierloom.stages.kv.block_table import BlockTable
from tierloom.stages.ops.hash import Chain


class Job(NamedTuple):
    """A save on its way through the workers."""

    passage: Passage
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
        self.jobs: dict[int, Job] = {}
        self.on_save: Callable[[Any, int, int, list[bytes]], None] | None = None
        """Called with (request, first token, one past the last, keys) when a save sets out."""
        self._groups, self._workers, self._settings = groups, workers, settings
        self._hello: Hello | None = None
        self._directory: ChunkDirectory | None = None
        self._waiting: list[Save] = []
        """Made, and not sent out yet."""
        self._number = 0
        self.epoch = 0
        """Resets of what is kept so far."""
        self._promised: dict[bytes, int] = {}
        """Keys that are being saved just now, to the job that does it."""

    def greet(self, hello: Hello, directory: ChunkDirectory) -> None:
        """The workers are there."""
        self._hello, self._directory = hello, directory

    def promised(self, chain: Chain, known: int) -> int:
        """How far beyond the first `known` tokens the chunk that comes next is being saved just
        now, in tokens of the prompt; 0: it is not."""
        assert self._hello is not None
        chunk, grain = self._hello.chunk, self._hello.grain
        for i in range((known // chunk + 1) * chunk // grain, known // grain, -1):
            if i <= len(chain.links) and chain.links[i - 1] in self._promised:
                return i * grain
        return 0

    def plan(
        self,
        output: Any,
        passages: Mapping[str, Passage],
        may: Callable[[Passage], bool],
        *,
        doubt: bool,
    ) -> list[Save]:
        """What this step completes, and what was left to save before. With `doubt` all of it
        waits: the KV may prove to be spoilt."""
        if self._drafted:
            self._undrafted(output, passages)
        for name, tokens in output.num_scheduled_tokens.items():
            p = passages.get(name)
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
            if _lost_blocks(self.jobs[save.job].passage.request, output):
                self._waiting.remove(save)
                self._cancel(save.job)
        if doubt:
            return []
        out, self._waiting = self._waiting, []
        return out

    def spoil(self) -> None:
        """A load failed within a step: nothing that waits may be kept. It is computed again, and
        then saved."""
        waiting, self._waiting = self._waiting, []
        for save in waiting:
            self._cancel(save.job)

    def _undrafted(self, output: Any, passages: Mapping[str, Passage]) -> None:
        """One request that is too long for the draft model keeps it from running for all of a step:
        what is computed in it lacks the draft's KV, and is not kept."""
        steps = output.num_scheduled_tokens
        mine = [(p, n) for name, n in steps.items() if (p := passages.get(name)) is not None]
        longest = max((p.request.num_computed_tokens + n for p, n in mine), default=0)
        if longest > self._drafted or not getattr(output, "num_spec_tokens_to_schedule", 1):
            for p, _ in mine:
                p.drafted = min(p.drafted, p.request.num_computed_tokens)

    def forget(self, epoch: int) -> None:
        """All that is kept was reset: nothing that was planned before may be kept, either."""
        self.epoch = epoch
        self.spoil()

    def waits(self, request: str) -> bool:
        """A save of this request has not been sent out yet."""
        return any(save.request == request for save in self._waiting)

    def finish(self, p: Passage, blocks: tuple[list[int], ...], may: bool) -> bool:
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
            if number in job.passage.jobs and _lost_blocks(job.passage.request, output)
        ]

    def heard(self, worker: int, told: Told) -> None:
        """A worker has read blocks, or is through with a job."""
        for number in told.captured:
            if (job := self.jobs.get(number)) is not None:
                job.captured.add(worker)
                if len(job.captured) == self._workers:
                    job.passage.jobs.discard(number)
        for number in told.ended:
            if (job := self.jobs.get(number)) is not None:
                job.ended.add(worker)
                if len(job.ended) == self._workers:
                    self._forget(number, job)

    def _cancel(self, number: int) -> None:
        job = self.jobs[number]
        job.passage.jobs.discard(number)
        job.passage.saved, job.passage.prompt_saved = 0, False
        self._forget(number, job)

    def _forget(self, number: int, job: Job) -> None:
        del self.jobs[number]
        for key in job.keys:
            if self._promised.get(key) == number:
                del self._promised[key]

    def _completes(self, p: Passage, known: int) -> bool:
        """There is a whole chunk that was not seen to."""
        return self._hello is not None and known - p.saved >= self._hello.chunk

    def _save(
        self, p: Passage, known: int, blocks: tuple[list[int], ...] | None, *, tail: bool
    ) -> None:
        """Set out to save what of the first `known` tokens is not kept: whole chunks, and with
        `tail` what is left over."""
        assert self._hello is not None
        chunk, grain, unit = self._hello.chunk, self._hello.grain, self._hello.unit
        end = known // unit * unit if tail else known // chunk * chunk
        links = p.links(self._settings.keys).links
        first, last = p.saved // chunk, -(-end // chunk)
        p.saved = max(p.saved, known // chunk * chunk)
        keys = [links[min((i + 1) * chunk, end) // grain - 1] for i in range(first, last)]
        while keys and self._is_kept(keys[0]):
            first, keys = first + 1, keys[1:]
        if not keys or blocks is None:
            return
        tables = tuple(
            BlockTable.cut(ids, size, first * chunk, end)
            for ids, size in zip(blocks, self._groups, strict=True)
        )
        if not all(all(t.blocks) for t in tables):  # block 0: behind a window, and given back
            return
        self._number += 1
        self.jobs[self._number] = Job(p, keys, set(), set())
        p.jobs.add(self._number)
        self._promised.update(dict.fromkeys(keys, self._number))
        assert p.chain is not None
        span = p.chain.span(first * chunk // grain, end // grain)
        self._waiting.append(Save(self._number, p.request.request_id, span, tables, self.epoch))
        if self.on_save is not None:
            self.on_save(p.request, first * chunk, end, keys)

    def _is_kept(self, key: bytes) -> bool:
        assert self._directory is not None
        return key in self._promised or self._directory.has(key)


def _lost_blocks(request: Any, output: Any) -> bool:
    """A request was preempted; by a reset of the cache it may be running again already."""
    again = getattr(output, "preempted_req_ids", None) or ()
    return request.status == RequestStatus.PREEMPTED or request.request_id in again
