"""The result of each transfer in a worker: one log line, and counters for vLLM's metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tierloom.adapters.door.families import gauges
from tierloom.adapters.vllm.exchange.messages import Load, Save
from tierloom.adapters.vllm.exchange.metrics import NOW, Stats
from tierloom.stages.contract.ticket import Ticket
from tierloom.stages.errors import Lost

if TYPE_CHECKING:
    from tierloom.adapters.vllm.worker.blended_loads import BlendedLoad

log = logging.getLogger("tierloom.vllm")

_EVERY = 1.0
"""Seconds between two reports of gauges."""


class TransferLog:
    """Used by the worker's one thread."""

    def __init__(self, rank: int = 0, read: Callable[[], dict[str, Any]] = dict) -> None:
        """Tokens of the first rank count; those of the others are the same tokens. Bytes and losses
        count in each. `read`: figures of this worker's pipelines, see `families.py`."""
        self._first, self._name, self._read = rank == 0, f"{NOW}{rank}", read
        self._told = -_EVERY
        self.stats = Stats()

    def take(self) -> Stats | None:
        """What was counted since, once a second with the gauges of this worker; None: nothing."""
        now = time.monotonic()
        if now - self._told >= _EVERY:
            self._told = now
            if told := gauges(self._read()):
                self.stats.data[self._name] = told
        return self.stats.take()

    def loaded(self, load: Load, tickets: list[Ticket], got: int, computed: int = 0) -> None:
        """A load has ended; `got` tokens of what was wanted are in place, `computed` of them since
        they were computed for it."""
        lost, nbytes, seconds = self._count("load", tickets)
        if not self._first:
            return
        want = load.start + load.span.wanted - load.fresh
        self.stats.add(loads=1, load_tokens=got - computed, load_failed_tokens=want - got)
        tiers = tickets[0].delivered() if tickets else {}
        for tier, n in tiers.items():
            self.stats.count(f"hit_tokens.{tier}", n)
        log.info(
            "request %s: %d tokens, %d in vLLM's cache, %d to load, %d loaded (%s) in %s%s",
            load.request, load.total, load.fresh, want, got - computed,
            _listed(tiers.items()), _speed(nbytes, seconds), lost,
        )  # fmt: skip

    def blended(self, blend: BlendedLoad) -> None:
        """A load with passages has ended, and so have its repairs."""
        if not self._first or not blend.tickets:
            return
        receipt, computed = blend.tickets[0].wait(), len(blend.computed)
        exact = max(0, blend.load.start + receipt.tokens - blend.load.fresh)
        attended = blend.tickets[0].attended
        self.stats.add(
            blends=1, blend_exact_tokens=exact, blend_tokens=receipt.blended,
            blend_computed_tokens=computed, blend_seconds=blend.seconds,
        )  # fmt: skip
        log.info(
            "request %s: %d tokens exact, %d blended, loaded in %.4f s; %d computed in %.4f s%s",
            blend.load.request, exact, receipt.blended, receipt.seconds, computed, blend.seconds,
            f", {attended:.0%} of attention fell on them" if attended else "",
        )  # fmt: skip

    def stored(self, save: Save, tickets: list[Ticket]) -> None:
        """A save has ended."""
        lost, nbytes, seconds = self._count("store", tickets)
        if not self._first:
            return
        tokens = min((t.wait().tokens for t in tickets), default=0)
        self.stats.add(stores=1, store_tokens=tokens)
        chunks = tickets[0].wait().tiers if tickets else {}
        log.info(
            "request %s: %d tokens to store, %d stored (chunks: %s) in %s%s",
            save.request, save.span.tokens, tokens,
            _listed(chunks.items()), _speed(nbytes, seconds), lost,
        )  # fmt: skip

    def _count(self, what: str, tickets: list[Ticket]) -> tuple[str, int, float]:
        """Count bytes, seconds and losses; the losses as text, the bytes, the seconds."""
        receipts = [t.wait() for t in tickets]
        nbytes = sum(r.nbytes for r in receipts)
        seconds = max((r.seconds for r in receipts), default=0.0)
        self.stats.count(f"{what}_bytes", nbytes)
        if tickets:
            self.stats.note(f"{what}_size_bytes", nbytes)
        if self._first:
            self.stats.count(f"{what}_seconds", seconds)
            if tickets:
                self.stats.note(f"{what}_duration_seconds", seconds)
        lost: dict[Lost, int] = {}
        for code, n in (pair for r in receipts for pair in r.lost.items()):
            lost[code] = lost.get(code, 0) + n
            self.stats.count(f"lost.{code.name.lower()}", n)
        return _lost(lost), nbytes, seconds


def _listed(pairs: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {n}" for name, n in pairs) or "none"


def _speed(nbytes: int, seconds: float) -> str:
    return f"{seconds:.4f} s, {nbytes / seconds / 1e9 if seconds else 0.0:.2f} GB/s"


def _lost(lost: Mapping[Lost, int]) -> str:
    listed = _listed((code.name.lower(), n) for code, n in lost.items())
    return f"; chunks lost: {listed}" if lost else ""
