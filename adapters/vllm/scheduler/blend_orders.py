"""Which prompts are blended, and in which steps their tokens are computed.

Text that was captured elsewhere is found behind the exact prefix and loaded as that is. When all
workers have told that it lies in its blocks, what must be computed is ordered slice by slice with
the plans of later steps, so that all ranks call the model in step. Whatever one of them lost is
computed by all. From the first approximate token on a request's block hashes are salted, once and
for good: vLLM's prefix cache gives such blocks to nobody else, whatever becomes of the load.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import numpy as np

from tierloom.adapters.engine.pipeline_parts import lookup_node
from tierloom.adapters.vllm.exchange.messages import (
    Load,
    Order,
    Passages,
    Placed,
    Stretches,
    WorkerInfo,
    WorkerReport,
    WorkerReports,
)
from tierloom.adapters.vllm.exchange.settings import Configured
from tierloom.adapters.vllm.scheduler.reports import Cache
from tierloom.adapters.vllm.scheduler.request import Patch, TrackedRequest
from tierloom.stages.blend.policies import stretches
from tierloom.stages.directory.text_index import TextIndex
from tierloom.stages.kv.text import Run

log = logging.getLogger("tierloom.vllm")

TAIL = 256
"""Most tokens behind the last run that are computed with it, to probe what they attend to."""
ROWS = 64
"""Fewest tokens of a load: its blocks must have room for the proofs."""
SLICE = 64
"""Tokens that a slice may always have, so that a busy engine's blends go on."""
FAULTS = 2
"""Repairs that may go wrong before blending is off."""

_NOT = "prompts are not blended: "
"""How a worker's reason begins, which is said of it alone."""


@dataclass(slots=True)
class BlendState:
    """One request's load with passages, from its plan to its last slice."""

    load: Load
    tail: tuple[int, int]
    waits: bool
    placed: dict[int, Placed] = field(default_factory=dict)
    probed: bool = False
    left: Stretches = field(default_factory=list)
    """To be computed, in rising order."""
    next: str = ""
    """What is ordered when nothing is left; empty: the workers have yet to tell something."""


class BlendOrders:
    """Used by the scheduler's thread alone."""

    def __init__(self, vllm_config: Any, conf: Configured, hash_block: int, block: int) -> None:
        scheduler = vllm_config.scheduler_config
        self._asked_only = conf.settings.blend == "ask"
        self._tokens, self._sequences = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
        self._workers = vllm_config.parallel_config.world_size
        self._hash_block, self._block = hash_block, block
        plan = lookup_node(conf.pipeline())
        self._least = plan.options.least if plan is not None else ROWS
        self._blends: dict[str, BlendState] = {}
        self._answers: dict[int, str] = {}
        """Of the proofs, by worker."""
        self._proving = self._proved = False
        self._faults: set[str] = set()
        """Requests whose repairs went wrong."""
        self.off = ""
        """Why nothing is blended any more."""

    def offer(self, p: TrackedRequest, cache: Cache, exact: int, most: int) -> int:
        """Find what is kept anywhere of a request that may be blended, as its `patch`; where the
        load then ends, or 0."""
        if cache.texts is None or not self._wanted(p):
            return 0
        p.patch = self._find(p, cache.texts, cache.info, exact, most)
        if p.patch is None:
            return 0
        self.salt(p, max(p.patch.exact, p.start))  # runs may begin sooner, once they are compared
        return p.patch.end

    def passages(self, p: TrackedRequest, end: int, blocks: Sequence[int]) -> Passages:
        """What a load up to token `end` brings of a request's patch. Raises ValueError if vLLM
        wants another end."""
        assert p.patch is not None
        if end != p.patch.end:
            raise ValueError(f"vLLM loads up to token {end}, {p.patch.end} were offered")
        blocks = list(blocks)[: -(-end // self._block)]
        return Passages(p.ids(0, end), p.patch.runs, blocks, not self._proved)

    def _wanted(self, p: TrackedRequest) -> bool:
        asked, request = p.options.blend, p.request
        if self.off or (asked is not True if self._asked_only else asked is False):
            return False
        reasons = {
            "it has an adapter (LoRA)": request.lora_request,
            "it has images, or the like": request.mm_features,
            # among them those who want log-probabilities of the prompt
            "it wants its prompt computed": request.skip_reading_prefix_cache,
            "it is a session that gets more input": request.resumable,
        }
        why = next((why for why, has in reasons.items() if has), "")
        if why:
            log.info("request %s is not blended: %s", request.request_id, why)
            p.options = replace(p.options, blend=False)
        return not why

    def _find(
        self, p: TrackedRequest, texts: TextIndex, info: WorkerInfo, exact: int, most: int
    ) -> Patch | None:
        """What is kept anywhere of the prompt's first `most` tokens behind the first `exact`, which
        tiers have, and those that vLLM has."""
        chain, computed = p.chain, p.start
        assert chain is not None
        exact = exact // info.grain * info.grain
        known = max(exact, computed)
        if self._off(info) or most - computed < ROWS or most - known < self._least:
            return None
        per = info.chunk // info.grain
        last = min(len(chain.links), -(-known // info.chunk) * per)
        runs = texts.find(
            np.frombuffer(p.ids(0, most), np.int32), chain.seed, start=known, least=self._least,
            opening=chain.opening, before=chain.links[last - 1] if known and last else b"",
        )  # fmt: skip
        if not runs:
            return None
        end = most if most - runs[-1].end <= TAIL else runs[-1].end // self._block * self._block
        kept = tuple(r for run in runs if (r := _until(run, end)) is not None)
        if not kept or end - computed < ROWS or end <= known:
            return None
        return Patch(exact, end, kept)

    def salt(self, p: TrackedRequest, first: int) -> None:
        """Give the blocks from the one with token `first` on hashes that nobody else has."""
        p.exact = min(p.exact, first)
        hashes, begin = p.request.block_hashes, p.exact // self._hash_block
        salt = secrets.token_bytes(32)
        for i in range(begin, min(p.salted, len(hashes))):
            hashes[i] = sha256(salt + hashes[i]).digest()
        p.salted = min(p.salted, begin)

    def begin(self, load: Load) -> None:
        """A load with passages is sent out."""
        passages = load.passages
        assert passages is not None
        end = len(passages.ids) // 4
        tail = passages.runs[-1].end, end
        self._blends[load.request] = BlendState(load, tail, passages.waits)

    def forget(self, request: str) -> None:
        """A request has ended: nothing more is ordered for it."""
        self._blends.pop(request, None)

    def orders(self, scheduled: int) -> list[Order]:
        """What goes out with a step of which vLLM computes `scheduled` tokens itself."""
        try:
            return self._orders(scheduled)
        except Exception:  # the step's loads must be sent out, whatever happens here
            log.exception("repairs could not be ordered")
            self._turn_off("repairs could not be ordered")
            failed = [Order(name, "fail") for name in self._blends]
            self._blends.clear()
            return failed

    def _orders(self, scheduled: int) -> list[Order]:
        out: list[Order] = []
        left = max(self._tokens - scheduled, SLICE)
        for name, blend in list(self._blends.items()):
            if self.off:
                del self._blends[name]
                out.append(Order(name, "fail"))
            elif blend.waits:
                if self._proved:
                    blend.waits = False
                    out.append(Order(name, "place"))
                elif not self._proving:
                    self._proving = True
                    out.append(Order(name, "prove"))
            elif blend.left and (left >= SLICE or not out):
                part = _take(blend.left, min(left, self._tokens), self._sequences)
                left -= sum(b - a for a, b in part)
                out.append(Order(name, "compute", part))
            if not blend.left and blend.next and not self.off:
                asks = blend.tail[1] - blend.tail[0] if blend.next == "probe" else 0
                if asks <= left or not any(order.stretches for order in out):
                    left -= asks
                    self._next(name, blend, out)
        return out

    def add(self, reports: WorkerReports | None) -> None:
        """What the workers have to tell of their blends."""
        for worker, report in sorted(reports.by_worker.items()) if reports else ():
            self._add(worker, report)

    def _add(self, worker: int, report: WorkerReport) -> None:
        for name, placed in report.placed.items():
            if (blend := self._blends.get(name)) is not None:
                blend.placed[worker] = placed
                if len(blend.placed) == self._workers:
                    self._plan(blend)
        for name, why in report.broken.items():
            if name in self._faults:  # another worker has told
                continue
            log.error("request %s: its repair went wrong, vLLM computes it: %s", name, why)
            self._faults.add(name)
            if len(self._faults) >= FAULTS:
                self._turn_off("repairs went wrong")
            elif (blend := self._blends.get(name)) is not None:
                blend.left, blend.next = [], "fail"
        if report.proved is not None:
            self._answers[worker] = report.proved
            if len(self._answers) == self._workers:
                self._proved = True
                if why := next(filter(None, self._answers.values()), ""):
                    self._turn_off(why)

    def _plan(self, blend: BlendState) -> None:
        """All workers have told: what is computed, and then."""
        told, (first, end) = list(blend.placed.values()), blend.tail
        fresh, last = blend.load.fresh, end
        probes = all(t.probe for t in told) and 0 < end - first <= min(TAIL, self._tokens)
        if probes and not blend.probed:
            blend.left = _union([t.absent for t in told], fresh, first)
            blend.next = "probe"
        else:
            blend.left = _union([t.compute for t in told], fresh, last)
            blend.next = "end"
        blend.placed = {}

    def _next(self, name: str, blend: BlendState, out: list[Order]) -> None:
        what, blend.next = blend.next, ""
        if what == "probe":
            blend.probed = True
            out.append(Order(name, "probe", [blend.tail]))
        else:
            del self._blends[name]
            out.append(Order(name, "fail" if what == "fail" else "end"))

    def _off(self, info: WorkerInfo) -> bool:
        if info.exactly and not self.off:
            self._turn_off(info.exactly)
        return bool(self.off)

    def _turn_off(self, why: str) -> None:
        if not self.off:
            log.error("prompts are not blended from now on: %s", why.removeprefix(_NOT))
        self.off = self.off or why


def _until(run: Run, end: int) -> Run | None:
    """The part of a run before token `end`."""
    kept = tuple(e._replace(tokens=min(e.tokens, end - e.start)) for e in run.excerpts
                 if e.start < end)  # fmt: skip
    return run._replace(excerpts=kept) if kept else None


def _union(given: list[Stretches], first: int, end: int) -> Stretches:
    """What lies in one of `given` between tokens `first` and `end`."""
    mask = np.zeros(end, np.bool_)
    for a, b in (s for each in given for s in each):
        mask[a:b] = True
    mask[:first] = False
    return stretches(mask)


def _take(left: Stretches, tokens: int, sequences: int) -> Stretches:
    """Take the first `tokens` tokens, in at most `sequences` stretches, out of `left`."""
    out: Stretches = []
    while left and tokens and len(out) < sequences:
        first, end = left.pop(0)
        until = min(end, first + tokens)
        out.append((first, until))
        tokens -= until - first
        if until < end:
            left.insert(0, (until, end))
    return out
