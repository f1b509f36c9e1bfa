"""SGLang: an external cache linker. There is no host pool; pages go between device and arena.

    --enable-unified-cache-external-linker --unified-cache-external-linker-backend dynamic

SGLang asks on its scheduler's thread, again and again for each request that waits, and ends a
request with an error where a load fails that was promised. So only what lies in memory is promised,
and held before; what lies colder is brought there after the first question, for the next. SGLang
names no pages before a prompt's new ones, so a page is an object here. Status: as `hicache.py`.
"""

from __future__ import annotations

import abc
import logging
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from tierloom.adapters.sglang.layer_loads import LayerLoads, PageLoad
from tierloom.adapters.sglang.opening import open_pages, open_rank_door, sglang_rank
from tierloom.adapters.sglang.page_store import PageStore, links_of, say_once
from tierloom.adapters.sglang.pool import device_pages, page_numbers
from tierloom.adapters.sglang.settings import chunked, linker_config
from tierloom.adapters.sglang.weights_watch import WeightsWatch
from tierloom.pipeline.runtime import Change
from tierloom.stages.contract.ticket import Ticket
from tierloom.stages.errors import LayoutError
from tierloom.stages.kv.block_table import BlockTable
from tierloom.stages.kv.object import LINK
from tierloom.stages.kv.prefix import Span

if TYPE_CHECKING:
    from tierloom.adapters.door.http_door import HttpDoor

log = logging.getLogger("tierloom.sglang")

_REMEMBERED = 4096
"""Requests of which something is known."""
_STRIDE = 8
"""Pages of which one is looked at."""


class TierloomLinker(UnifiedCacheLinker):
    """One rank's linker. Raises ConfigError for what the user can mend; what cannot be stored at
    all is said in the log, and SGLang serves on without."""

    def __init__(
        self, server_args: Any, params: Any, *, components: Any = (), extra_config: Any = None,
        forward_stream: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        """`params`: SGLang's CacheInitParams, whose device pool stays SGLang's."""
        self.said = linker_config(extra_config)
        self.forward_stream = forward_stream
        pool = params.token_to_kv_pool_allocator.get_kvcache()
        self.pools = {PoolName.KV: pool}
        self.layer_done_counter = LayerLoads()
        self.off = ""
        """Why nothing is stored; empty: it is."""
        self._store: PageStore | None = None
        self._kinds: set[str] = set()
        """Names of memory tiers, which are empty until the pipeline is open."""
        self._memory: set[str] = set()
        """Pages that lie in memory, by their names in SGLang."""
        self._asked: dict[str, None] = {}
        """Requests whose pages were sent for."""
        self._failed: dict[str, None] = {}
        """Requests that a page was missing for: each of theirs is looked at."""
        self._queued: dict[str, PageLoad] = {}
        self._offloads: deque[Ticket | None] = deque()
        split = list(filter(_of_several, (params.attn_cp_cache_group, params.attn_tp_cache_group)))
        self._groups = split or list(filter(_of_several, (params.tp_cache_group,)))
        """Ranks that go on as one, as SGLang's tree reduces over them."""
        self._weights = WeightsWatch()
        self._door: HttpDoor | None = None
        try:
            self._refuse(components)
            self._open(server_args, params, pool)
        except LayoutError as error:
            self.off = str(error)
            log.warning("nothing is stored: %s", self.off)

    # -- the scheduler's thread ----------------------------------------------------------------

    def lookup(self, rid: str, transfers: Sequence[Any]) -> list[int]:
        """Lengths of prefixes, in pages, that lie in memory. What of the rest lies elsewhere is
        sent for, once for each request."""
        keys = self._keys(transfers)
        if not keys or self._ended():
            return []
        found = self._in_memory(keys, each=rid in self._failed)
        if found < len(keys) and rid not in self._asked:
            self._fetch(rid, keys[found:])
        if found * self._page < self.said.settings.min_tokens or not found:
            return []
        return [found] if not self._groups else list(range(1, found + 1))  # ranks intersect theirs

    def load(self, rid: str, transfers: Sequence[Any]) -> bool:
        """Hold the pages of a request and queue them; False where one is gone."""
        load = self._held(self._keys(transfers), transfers)
        if not self._agreed(load is not None):
            _remember(self._failed, rid)
            if load is not None:
                load.release()
            return False
        assert load is not None
        self._queued[rid] = load
        return True

    def _held(self, keys: list[str], transfers: Sequence[Any]) -> PageLoad | None:
        if not keys or self._store is None or self._ended():
            return None
        numbers = page_numbers(transfers[0].device_indices, self._page, len(keys))
        span = _span(keys, self._page)
        held = self._store.pipeline.hold(span) if numbers is not None else None
        if held is None or numbers is None:
            return None
        return PageLoad(self._store, span, numbers, held)

    def _agreed(self, mine: bool) -> bool:
        """Whether all ranks can load: SGLang has them go on as one, and each has its own memory."""
        verdict = torch.tensor([int(mine)], dtype=torch.int)
        for group in self._groups:
            torch.distributed.all_reduce(verdict, torch.distributed.ReduceOp.MIN, group=group)
        return bool(verdict.item())

    def cancel_queued_load(self, rid: str) -> bool:
        """Let go of a load that has not started."""
        if (load := self._queued.pop(rid, None)) is None:
            return False
        load.release()
        return True

    def start_layer_wise_loading(self) -> int:
        """Start what is queued; the index by which its layers are waited for, -1: nothing."""
        queued, self._queued = list(self._queued.values()), {}
        if not queued:
            return -1
        with torch.cuda.stream(self.forward_stream):  # None: no matter which
            for load in queued:
                load.start()
        return self.layer_done_counter.begin(queued)

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """Wait until nothing of a batch touches the device pool any more; whether all came."""
        return self.layer_done_counter.finish(counter_index)

    def offload(self, transfers: Sequence[Any], session_id: str | None = None) -> bool:
        """Store a node's pages; SGLang keeps them until this is acknowledged."""
        keys, store = self._keys(transfers), self._store
        if not keys or store is None or self._ended():
            self._offloads.extend([None] * bool(self._groups))  # ranks count theirs alike
            return bool(self._groups)
        numbers = page_numbers(transfers[0].device_indices, self._page, len(keys))
        if numbers is None:
            say_once(f"{len(keys)} pages of the device pool are not whole pages")
            return False
        with torch.cuda.stream(self.forward_stream):  # None: no matter which
            ticket = store.pipeline.store(
                _span(keys, self._page), store.pages.caches, blocks=BlockTable(numbers)
            )
        self._offloads.append(ticket)
        return True

    def num_completed_offloads(self) -> int:
        """How many stores, the oldest first, have read their pages."""
        done = (i for i, t in enumerate(self._offloads) if t is not None and not t.is_captured)
        return next(done, len(self._offloads))

    def pop_completed_offload(self) -> bool:
        """Acknowledge the oldest store; whether it was not given up."""
        ticket = self._offloads.popleft()
        return ticket is not None and ticket.captured()

    # -- SGLang's other calls ------------------------------------------------------------------

    def reset(self) -> None:
        """End what is under way. What is stored stays: SGLang flushes its own cache by this."""
        for rid in list(self._queued):
            self.cancel_queued_load(rid)
        self.layer_done_counter.reset()
        for ticket in filter(None, self._offloads):
            ticket.captured()
        self._offloads.clear()
        self._asked.clear()

    def close(self) -> None:
        """End what is under way, close the tiers, free the memory."""
        self.reset()
        self.off = "it was closed"
        if self._door is not None:
            self._door.close()
        if self._store is not None:
            self._store.close()
            self._store = None

    def _open(self, args: Any, params: Any, pool: Any) -> None:
        self._page, rank = int(params.page_size), sglang_rank()
        if rank.pp_size > 1:
            raise LayoutError("stages of a pipeline would each load what they have: use HiCache")
        overrides = chunked(self.said, self._page, chunk=self._page)
        overrides |= {"graphs.retrieve.pace.by": "layer"}
        self._store = open_pages(
            self.said, overrides, device_pages(pool, self._page), rank, args=args,
            start_layer=int(getattr(pool, "start_layer", 0) or 0), watch=self._note,
        )  # fmt: skip
        store = self._store
        tiers = store.pipeline.tiers
        self._kinds = {name for name, tier in tiers.items() if tier.in_arena}
        if not self._kinds:
            raise LayoutError("it loads from memory, and the pipeline has no memory tier")
        if self.said.settings.http and not rank.index:
            self._door = open_rank_door(self.said, lambda: [store])

    def _refuse(self, components: Any) -> None:
        if UNKNOWN:
            raise LayoutError(f"this SGLang wants more of a linker: {', '.join(sorted(UNKNOWN))}")
        names = {getattr(c, "name", str(c)) for c in components}
        if more := names - {"FULL", "SWA"}:
            raise LayoutError(
                f"the linker keeps no {', '.join(sorted(more))} state, without which a prefix "
                "cannot be restored: use HiCache"
            )

    def _note(self, change: Change) -> None:
        """A page came to a tier or went."""
        if change.tier in self._kinds:
            key = change.links[-LINK:].hex()
            (self._memory.add if change.kept else self._memory.discard)(key)

    def _keys(self, transfers: Sequence[Any]) -> list[str]:
        keys: list[str] = (transfers[0].keys or []) if transfers else []
        return keys

    def _in_memory(self, keys: Sequence[str], *, each: bool) -> int:
        """Pages, from the first on, that lie in memory. Not `each` is looked at: the tail of a
        prompt goes first, so where a page is, those before it nearly always are, and `load` says
        no where one is not."""
        has = self._memory.__contains__
        if not has(keys[0]):
            return 0
        step = 1 if each else _STRIDE
        last = next((i for i in range(step - 1, len(keys), step) if not has(keys[i])), len(keys))
        begin = last - last % step
        return next((i for i in range(begin, len(keys)) if not has(keys[i])), len(keys))

    def _fetch(self, rid: str, keys: Sequence[str]) -> None:
        """Have what lies in colder tiers brought into memory, verified, and placed nowhere."""
        if self._store is None:
            return
        _remember(self._asked, rid)
        self._store.pipeline.prefetch(partial(_span, keys, self._page), self._store.pages.caches)

    def _ended(self) -> bool:
        if not self.off and self._weights.changed:
            self.off = "the engine's weights were changed, and nothing says what they are now"
            log.warning("nothing is stored any more: %s", self.off)
        return bool(self.off)


def _span(keys: Sequence[str], page: int) -> Span:
    """Pages that SGLang names, each an object of its own. What comes before them is not known."""
    return Span(links_of(keys), b"", len(keys) * page)


def _of_several(group: Any) -> bool:
    return group is not None and torch.distributed.get_world_size(group=group) > 1


def _remember(requests: dict[str, None], rid: str) -> None:
    requests[rid] = None
    if len(requests) > _REMEMBERED:
        del requests[next(iter(requests))]


def _not_done(self: TierloomLinker, *_: Any, **__: Any) -> None:
    """What a later SGLang asks of a linker that is off for just this reason."""


UNKNOWN = frozenset(getattr(TierloomLinker, "__abstractmethods__", ()))
"""What this SGLang wants of a linker beside what 0.5.23 wanted. With it left abstract, SGLang would
not start; with it, the linker is off, and says why."""
for _name in UNKNOWN:
    setattr(TierloomLinker, _name, _not_done)
abc.update_abstractmethods(TierloomLinker)
