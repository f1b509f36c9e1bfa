"""Requests that are computed at one engine and answered at another, beside vLLM's scheduler.

A prefiller promises a request's chunks before it computes them, and holds none of vLLM's blocks for
anybody. A decoder's request waits, without a block, until what it lacks has landed in its workers'
memory; then it is loaded as whatever lies there.
"""

from __future__ import annotations

import logging
import time
from typing import Any, NamedTuple

from vllm.v1.request import RequestStatus

from tierloom.adapters.vllm.exchange.handoff_params import (
    NOWHERE,
    Elsewhere,
    GivenAway,
    answer,
    first_token,
    outside_name,
    read_params,
)
from tierloom.adapters.vllm.exchange.messages import Answered, Fetch, Plan, Promised, WorkerReports
from tierloom.adapters.vllm.exchange.settings import Configured
from tierloom.adapters.vllm.scheduler.request import TrackedRequest
from tierloom.adapters.vllm.scheduler.side import SchedulerSide
from tierloom.pipeline.handoff.handoff import ToldDecoder, ticket_of
from tierloom.stages.kv.object import LINK

log = logging.getLogger("tierloom.vllm")

_LONGEST = 600.0
"""Seconds after which workers that have not said how a hand-off ended will not say it."""
_ANSWERED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


class _PromisedRequest(NamedTuple):
    """What others may fetch of a request."""

    ticket: str
    """By its name."""
    tokens: int
    keys: list[bytes]


class _Waiting(NamedTuple):
    """A request for which KV is fetched."""

    workers: set[int]
    """That have yet to say that all has come which will."""
    until: float
    """When that is believed no more."""


class HandoffSide(SchedulerSide):
    """The scheduler's side of an engine that serves, or that others compute for."""

    hands_over = True

    def __init__(self, vllm_config: Any, kv_cache_config: Any, conf: Configured) -> None:
        super().__init__(vllm_config, kv_cache_config, conf)
        spec, transfer = conf.pipeline(), vllm_config.kv_transfer_config
        self._engine, self._tp = (
            str(transfer.engine_id), vllm_config.parallel_config.tensor_parallel_size,
        )  # fmt: skip
        one = len(self._groups) == 1
        if not one:
            log.warning("nothing is handed over: that wants one kind of attention in all layers")
        self._gives = one and spec.serve is not None and self.saves is not None
        handoff = spec.handoff
        self._lands = one and handoff is not None and handoff.wait > 0 and self._loads
        self._workers = range(vllm_config.parallel_config.world_size)
        self._told_ranks = len(self._workers) == 1
        self._tells = handoff is not None and bool(handoff.proxy)
        # A decoder is told at its first worker, which fetches its own share alone.
        self._is_offered = (
            self._lands and handoff is not None and handoff.offers and len(self._workers) == 1
        )
        self._receivers: dict[str, ToldDecoder] = {}
        """Requests whose proxy is to be told of their end, and what."""
        self._given: dict[str, GivenAway] = {}
        self._promised: dict[str, _PromisedRequest] = {}
        """Requests whose chunks are promised, until they end."""
        self._ended: dict[bytes, list[bytes]] = {}
        """Tickets of requests that have, and keys that may still be being saved."""
        self._landed: dict[str, Elsewhere] = {}
        self._waiting: dict[str, _Waiting] = {}
        """Requests for which the workers fetch now."""
        self._arrived: set[str] = set()
        """Requests for which they have."""
        self._plan = Plan()
        """What the next one has of hand-offs."""

    def on_new_request(self, request: Any) -> None:
        super().on_new_request(request)
        p = self._requests[request.request_id]
        try:
            given, landed = read_params(request.kv_transfer_params)
        except ValueError as error:
            log.warning("request %s is not handed over: %s", request.request_id, error)
            return
        if given is not None and given.receiver is not None:
            if not self._tells:
                log.warning(
                    "request %s is not handed over: its proxy names a decoder, and no "
                    "handoff.proxy is to be told", request.request_id,
                )  # fmt: skip
                return
            self._receivers[request.request_id] = given.receiver
        if given is not None and self._gives and not p.options.skip_save:
            self._given[request.request_id] = given
        if landed is None and self._is_offered:
            landed = NOWHERE
        if landed is not None and self._lands and not p.options.skip_load:
            self._landed[request.request_id] = landed

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int | None, bool]:
        name = request.request_id
        p = self._requests.get(name)
        if name in self._given and p is not None and not self._has_chain(p) and self._may_wait(p):
            return None, False  # what cannot be named yet would be computed and not saved
        if self._waits(name) or (name in self._landed and self._fetch(request)):
            return None, False
        if name not in self._arrived or self.blends is not None:
            return super().get_num_new_matched_tokens(request, computed)
        blocks, self._block = self._block, self.info.unit  # also the part of a last block
        try:
            return super().get_num_new_matched_tokens(request, computed)
        finally:
            self._block = blocks

    def build_connector_meta(self, output: Any) -> Plan:
        for name, given in list(self._given.items()):  # a decoder waits from its offer on
            if given.receiver is None or name in output.num_scheduled_tokens:
                self._promise(name)
        plan = super().build_connector_meta(output)
        for ticket, keys in list(self._ended.items()):
            if self.saves is None or not self.saves.under_way(keys):
                del self._ended[ticket]
                plan.settled.append(ticket)
        mine, self._plan = self._plan, Plan()
        plan.promised, plan.released = mine.promised, mine.released
        if self._gives and not self._told_ranks and self.reports.cache is not None:
            plan.ranks, self._told_ranks = self.info.serves, True
        plan.answered = mine.answered
        plan.fetches, plan.unwanted = mine.fetches, mine.unwanted
        return plan

    def update_connector_output(self, reports: WorkerReports | None) -> None:
        super().update_connector_output(reports)
        for worker, report in reports.by_worker.items() if reports else ():
            for name in report.landed:
                if (waiting := self._waiting.get(name)) is None:
                    continue
                waiting.workers.discard(worker)
                if not waiting.workers:
                    del self._waiting[name]
                    self._arrived.add(name)

    def request_finished_all_groups(self, request: Any, blocks: tuple[list[int], ...]) -> bool:
        name = request.request_id
        landed = self._landed.pop(name, NOWHERE)
        if landed != NOWHERE:  # given up, or refused by vLLM
            self._plan.fetches.append(Fetch(name, [], landed))
        self._arrived.discard(name)
        if self._waiting.pop(name, None) is not None:
            self._plan.unwanted.append(name)
        return super().request_finished_all_groups(request, blocks)

    def handed_off(self, request: Any) -> dict[str, Any] | None:
        """A request has ended: what its answer says of its KV. None: nothing is kept for others."""
        name = request.request_id
        self._given.pop(name, None)
        promised = self._promised.pop(name, None)
        receiver, told = self._receivers.pop(name, None), None
        ticket = ticket_of(promised.ticket) if promised is not None else b""
        if request.status not in _ANSWERED:
            receiver = None
        elif receiver is not None:
            self._plan.answered.append(Answered(ticket, receiver))
        elif promised is not None:
            at = self.info.serves[0].address
            told = answer(self._engine, promised.ticket, at, promised.tokens, self._tp)
        if promised is None:
            return first_token(request)
        if told is None and receiver is None:
            self._plan.released.append(ticket)
        else:
            self._ended[ticket] = promised.keys
        return told or first_token(request)

    def has_pending_push_work(self) -> bool:
        return bool(self._ended) or super().has_pending_push_work()

    def _promise(self, name: str) -> None:
        """Promise what will be saved of a request, as soon as it can be named."""
        p = self._requests.get(name)
        if p is None or self.off:
            del self._given[name]
            return
        if not self._may_save(p):
            return
        given = self._given.pop(name)
        if not self.info.serves:
            log.warning("request %s is not handed over: nothing is served", name)
            return
        ticket, chunks = given.name or outside_name(name), self._chunks(p)
        tokens, keys = min(p.request.num_prompt_tokens, p.most), [c[-LINK:] for c in chunks]
        self._promised[name] = _PromisedRequest(ticket, tokens, keys)
        self._plan.promised.append(Promised(ticket_of(ticket), chunks, given.receiver))

    def _waits(self, name: str) -> bool:
        """The workers have yet to say that all has come."""
        waiting = self._waiting.get(name)
        return waiting is not None and not self.off and time.monotonic() < waiting.until

    def _fetch(self, request: Any) -> bool:
        """Have the workers fetch what another engine has computed, or computes; False: nothing is
        waited for."""
        name = request.request_id
        p = self._requests.get(name)
        if p is None or self.off or p.failed:
            return False
        if not self._has_chain(p):
            return self._may_wait(p)
        landed, chunks = self._landed.pop(name), self._chunks(p)
        if landed == NOWHERE and self._knows(p):
            self._arrived.add(name)
            return False
        if not chunks:
            return False
        self._waiting[name] = _Waiting(set(self._workers), time.monotonic() + _LONGEST)
        self._plan.fetches.append(Fetch(name, chunks, landed))
        return True

    def _knows(self, p: TrackedRequest) -> bool:
        """All of a prompt is here, by what the workers have said so far."""
        most = min(p.request.num_prompt_tokens, p.most) // self.info.unit * self.info.unit
        plan = self._cache.directory.find(p.links(self.conf.settings.keys).links, most)
        return bool(sum(part.tokens for part in plan) >= most)

    def _chunks(self, p: TrackedRequest) -> list[bytes]:
        """Grain links of each chunk of a prompt, as a prefiller saves it."""
        info = self.info
        end = min(p.request.num_prompt_tokens, p.most) // info.unit * info.unit
        links = p.links(self.conf.settings.keys).links[: end // info.grain]
        per = info.chunk // info.grain
        return [b"".join(links[i : i + per]) for i in range(0, len(links), per)]
