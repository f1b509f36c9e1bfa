"""A pool's pages in a pipeline, by the page hashes that SGLang names them with.

SGLang's hashes are a chain, as our grain links are: a page is a grain, and a run of pages a chunk.
Which chunk a page is in follows from how many pages are before it in the prompt, so a call wants
their hashes as well (`prefix`). Whatever fails here is a miss, said once in the log.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from tierloom.adapters.engine.pipeline_parts import asked_tiers
from tierloom.adapters.sglang.pool import Pages, page_numbers
from tierloom.pipeline.pipeline import Pipeline
from tierloom.stages.contract.ticket import Ticket
from tierloom.stages.errors import Closed, TierDown
from tierloom.stages.kv.block_table import BlockTable
from tierloom.stages.kv.object import LINK
from tierloom.stages.kv.prefix import Span

if TYPE_CHECKING:
    import torch

log = logging.getLogger("tierloom.sglang")

R = TypeVar("R")


def never_raises(answer: Callable[..., R]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Answer `answer(*args)` where a method raises: SGLang's threads are not to end for us."""

    def wrap(method: Callable[..., R]) -> Callable[..., R]:
        @functools.wraps(method)
        def safe(self: Any, *args: Any, **named: Any) -> R:
            try:
                return method(self, *args, **named)
            except Closed:
                return answer(*args, **named)
            except Exception as error:
                say_once(f"{method.__name__}: {type(error).__name__}: {error}")
                log.debug("%s failed", method.__name__, exc_info=True)
                return answer(*args, **named)

        return safe

    return wrap


@functools.lru_cache(256)
def say_once(what: str) -> None:
    """Log a warning, the first time that it comes up."""
    log.warning("%s: such pages are computed, as if they were not stored", what)


def none_found(keys: Sequence[str], *_: Any, **__: Any) -> list[bool]:
    return [False] * len(keys)


def links_of(keys: Sequence[str]) -> bytes:
    """Page hashes as SGLang spells them, as grain links. Raises ValueError."""
    links = bytes.fromhex("".join(keys))
    if len(links) != LINK * len(keys):
        raise ValueError("page hashes are not SHA-256 in hexadecimal")
    return links


class PageStore:
    """The pages of one pool. Its calls may come from several threads; each returns when nothing
    touches the pool's memory any more. Owns its pipeline."""

    def __init__(self, pages: Pages, pipeline: Pipeline, *, wait: float, min_tokens: int) -> None:
        """`wait`: seconds for a question to tiers without an index here. `min_tokens`: fewer are
        not worth loading."""
        self.pages, self.pipeline = pages, pipeline
        self.per_chunk = pipeline.spec.chunk.tokens // pages.tokens
        """Pages of a chunk."""
        self._wait, self._least = wait, min_tokens
        asked = [pipeline.tiers[name] for name in asked_tiers(pipeline.spec)]
        self._local = [tier for tier in asked if tier.local]
        self._remote = [tier for tier in asked if not tier.local]
        self._storing: dict[str, Ticket] = {}
        """Stores that end within a chunk, by their last page: one that goes on there waits."""

    @never_raises(lambda *_: 0)
    def count(self, keys: Sequence[str], prefix: Sequence[str] = ()) -> int:
        """How many of `keys`, from the first on, are stored: by this process's indexes, and where
        these do not have all, by asking the other tiers."""
        if self.pipeline.off is not None or not keys:
            return 0
        span, lead = self._span(keys, prefix)
        found = self._kept_here(span.links)
        if found < lead + len(keys) and any(t.available for t in self._remote):
            found = max(found, self._kept_elsewhere(span))
        found = max(0, found - lead)
        return found if found * self.pages.tokens >= self._least else 0

    @never_raises(none_found)
    def each(self, keys: Sequence[str]) -> list[bool]:
        """Which of `keys` are stored, where a page is a chunk: as `count`, within `wait` in all."""
        if self.pipeline.off is not None:
            return none_found(keys)
        spans = [self._span([key], ())[0] for key in keys]
        has = [bool(self._kept_here(span.links)) for span in spans]
        if any(t.available for t in self._remote):
            ask = partial(self.pipeline.begin_lookup, deadline=self._wait)
            asked = {i: ask(span) for i, span in enumerate(spans) if not has[i]}
            futures.wait(asked.values(), self._wait)
            for i, one in asked.items():
                has[i] = not one.cancel() and one.exception() is None and one.result() > 0
        return has

    @never_raises(none_found)
    def load(
        self, keys: Sequence[str], indices: torch.Tensor, prefix: Sequence[str] = ()
    ) -> list[bool]:
        """Fill pages of the pool, which token slots `indices` name; which came. After a page that
        did not come, none is said to have."""
        numbers = page_numbers(indices, self.pages.slots, len(keys))
        if numbers is None:
            say_once(f"{len(indices)} slots for {len(keys)} pages that are not whole pages")
            return none_found(keys)
        span, lead = self._span(keys, prefix)
        receipt = self.pipeline.retrieve(
            span._replace(wanted=span.tokens), self.pages.caches,
            blocks=self._table(lead, numbers),
        ).wait()  # fmt: skip
        came = max(0, receipt.tokens // self.pages.tokens - lead)
        return [i < came for i in range(len(keys))]

    @never_raises(none_found)
    def save(
        self, keys: Sequence[str], indices: torch.Tensor, prefix: Sequence[str] = ()
    ) -> list[bool]:
        """Store pages of the pool; returns when they have been read, whatever tiers take them."""
        numbers = page_numbers(indices, self.pages.slots, len(keys))
        if numbers is None:
            say_once(f"{len(indices)} slots for {len(keys)} pages that are not whole pages")
            return none_found(keys)
        span, lead = self._span(keys, prefix)
        if lead:
            self._wait_for(prefix[-1])
        ticket = self.pipeline.store(span, self.pages.caches, blocks=self._table(lead, numbers))
        if (lead + len(keys)) % self.per_chunk:
            self._storing = {k: t for k, t in self._storing.items() if not t.future.done()}
            self._storing[keys[-1]] = ticket
        return [ticket.captured()] * len(keys)

    def clear(self, *, local: bool) -> None:
        """Delete what is stored; `local`: only what no other engine can read."""
        try:
            self.pipeline.clear(local=local)
        except TierDown as error:
            log.warning("%s", error)

    def close(self) -> None:
        self.pipeline.close()

    def _wait_for(self, last: str) -> None:
        """Until a store that ended with page `last` has ended: what goes on there joins it."""
        if (before := self._storing.pop(last, None)) is not None:
            before.wait()

    def _span(self, keys: Sequence[str], prefix: Sequence[str]) -> tuple[Span, int]:
        """The pages, from the beginning of a chunk on, and how many of them are only named."""
        lead = len(prefix) % self.per_chunk
        first = len(prefix) - lead
        parent = bytes.fromhex(prefix[first - 1]) if first else b""
        tokens, start = (lead + len(keys)) * self.pages.tokens, first * self.pages.tokens
        return Span(links_of([*prefix[first:], *keys]), parent, tokens, start=start), lead

    def _table(self, lead: int, numbers: list[int]) -> BlockTable:
        return BlockTable([-1] * lead + numbers, 0, lead * self.pages.tokens)

    def _kept_here(self, links: bytes) -> int:
        """Pages that the indexes of this process have, from the first on."""
        asked = [(tier.find, tier.unread) for tier in self._local if tier.available]
        found, step = 0, self.per_chunk * LINK
        for at in range(0, len(links), step):
            chunk = links[at : at + step]
            best, whole = 0, len(chunk) // LINK
            for find, unread in asked:
                kept = find(chunk)
                if kept is not None and kept.grains > best and kept.key not in unread:
                    best = kept.grains
                    if best == whole:
                        break
            found += best
            if best < whole:
                break
        return found

    def _kept_elsewhere(self, span: Span) -> int:
        """Pages that all tiers together have, as far as they say so in time."""
        asked = self.pipeline.begin_lookup(span, deadline=self._wait)
        try:
            return asked.result(self._wait) // self.pages.tokens
        except futures.TimeoutError:
            asked.cancel()
            return 0


class Traffic:
    """What SGLang shows of a storage backend: pages and GB/s of each call since it last asked."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self.pages: list[int] = []
        self.rates: list[float] = []

    def note(self, pages: int, began: float) -> None:
        """`began`: by `time.perf_counter()`."""
        if pages:
            self.pages.append(pages)
            seconds = max(1e-9, time.perf_counter() - began)
            self.rates.append(pages * self._page_bytes / seconds / 1e9)

    def take(self) -> tuple[list[int], list[float]]:
        taken = self.pages, self.rates
        self.pages, self.rates = [], []
        return taken
