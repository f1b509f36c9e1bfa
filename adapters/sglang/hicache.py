"""SGLang: a HiCache storage backend. SGLang copies pages to its host pool; what is below is ours.

    --hicache-storage-backend dynamic --hicache-storage-backend-extra-config EXTRA

SGLang makes one for each rank, and calls it from three threads: one asks, one reads, one writes.
Whatever goes wrong is a miss. `tierloom sglang` prints the whole command.

    SGLang    platform                status
    0.5.23    CPU, by stand-ins       tested, each change: SGLang's copies between device and host
              for CUDA's copies       pool are torch's here, and memory is not page-locked
    0.5.23    CUDA                    written from its code, not run yet
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    PoolHitPolicy,
    PoolName,
    PoolTransferResult,
)
from sglang.srt.runtime_context import get_server_args

from tierloom.adapters.engine.rank import Rank
from tierloom.adapters.sglang.opening import open_pages, open_rank_door, open_side_pool, replica
from tierloom.adapters.sglang.page_store import PageStore, Traffic, none_found, say_once
from tierloom.adapters.sglang.pool import host_pages
from tierloom.adapters.sglang.settings import any_grain, chunked, hicache_config
from tierloom.adapters.sglang.share import refuse_split_pages
from tierloom.adapters.sglang.weights_watch import WeightsWatch
from tierloom.stages.errors import LayoutError

if TYPE_CHECKING:
    import torch

    from tierloom.adapters.door.http_door import HttpDoor

log = logging.getLogger("tierloom.sglang")


class TierloomHiCache(HiCacheStorage):
    """One rank's storage behind SGLang's host pool.

    Raises ConfigError, from `__init__` and `register_mem_pool_host`, for what the user can mend;
    what cannot be stored at all is said in the log, and SGLang serves on without.
    """

    def __init__(self, storage_config: Any, _: Any = None) -> None:
        """`storage_config`: SGLang's HiCacheStorageConfig."""
        self.config = storage_config
        self.said = hicache_config(storage_config.extra_config)
        self.said.pipeline(any_grain(self.said))  # every problem of it, before anything is opened
        self.registered_pools: dict[Any, Any] = {}
        self.off = "no host pool was registered"
        """Why nothing is stored; empty: it is."""
        self._store: PageStore | None = None
        self._sides: dict[Any, list[PageStore]] = {}
        self._loads, self._saves = Traffic(0), Traffic(0)
        self._weights = WeightsWatch()
        self._door: HttpDoor | None = None

    # -- SGLang's pools ------------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Open the pipeline for SGLang's host pool, which stays SGLang's."""
        super().register_mem_pool_host(mem_pool_host)
        overrides = chunked(self.said, int(mem_pool_host.page_size))
        try:
            refuse_split_pages(self.config)
            pages = host_pages(mem_pool_host)
            start = int(getattr(mem_pool_host, "start_layer", 0) or 0)
            self._store = open_pages(
                self.said, overrides, pages, self.rank, args=get_server_args(), start_layer=start
            )
        except LayoutError as error:
            self.off = str(error)
            log.warning("nothing is stored: %s", self.off)
        else:
            self.off = ""
            self._loads, self._saves = (Traffic(pages.nbytes) for _ in range(2))
            self._warn_of_replicas()
            if self.said.settings.http and not self.rank.index:
                self._door = open_rank_door(self.said, self._all)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Open a pipeline for a side pool (a window's, a state's, an indexer's, a draft's)."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if host_pool is getattr(self, "mem_pool_host", None) or self._store is None or self.off:
            return
        try:
            self._sides[host_pool_name] = open_side_pool(
                self.said, self._store, host_pool, str(host_pool_name), self.rank
            )
        except LayoutError as error:
            log.warning("pages of pool %s are not stored: %s", host_pool_name, error)

    @property
    def rank(self) -> Rank:
        """Where this process is in the engine."""
        c = self.config
        return Rank(c.tp_rank, c.tp_size, c.pp_rank, c.pp_size, replica() or c.dp_rank, 1)

    # -- pages of the KV pool ------------------------------------------------------------------

    def batch_exists(self, keys: Sequence[str], extra_info: Any = None) -> int:
        """How many pages, from the first on, are stored."""
        store = self._ready()
        prefix = getattr(extra_info, "prefix_keys", None) or ()
        return store.count(keys, prefix) if store is not None else 0

    def batch_get_v1(
        self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: Any = None
    ) -> list[bool]:
        """Fill pages of the host pool; nothing writes into them after it has returned."""
        store, began = self._ready(), time.perf_counter()
        if store is None:
            return none_found(keys)
        came = store.load(keys, host_indices, getattr(extra_info, "prefix_keys", None) or ())
        self._loads.note(sum(came), began)
        return came

    def batch_set_v1(
        self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: Any = None
    ) -> list[bool]:
        """Store pages of the host pool; they have been read when it returns."""
        store, began = self._ready(), time.perf_counter()
        if store is None:
            return none_found(keys)
        prefix = getattr(extra_info, "prefix_keys", None)  # None: SGLang was not told to pass them
        if prefix is None and store.per_chunk > 1:
            say_once(
                "SGLang does not say where in the prompt its pages are: add "
                '"hicache_storage_pass_prefix_keys": true to the extra config, or set chunk.tokens '
                f"to the page size, {store.pages.tokens}"
            )
            return none_found(keys)
        kept = store.save(keys, host_indices, prefix or ())
        self._saves.note(sum(kept), began)
        return kept

    # -- pages of all pools --------------------------------------------------------------------

    def batch_exists_v2(
        self, keys: Sequence[str], pool_transfers: Any = None, extra_info: Any = None
    ) -> Any:
        """The longest prefix that every pool has, as far as its policy wants it, and which shorter
        ones they have."""
        kv = self.batch_exists(keys, extra_info)
        hits: dict[Any, int] = {PoolName.KV: kv} if kv else {}
        restorable = list(range(1, kv + 1))
        for transfer in pool_transfers or ():
            if not restorable:
                break
            lengths = self._restorable(transfer, keys[:kv])
            if lengths:
                hits[transfer.name] = lengths[-1]
            restorable = sorted(set(restorable) & set(lengths))
        return PoolTransferResult(restorable[-1] if restorable else 0, hits, restorable)

    def batch_get_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[Any, Any]:
        """Fill pages of side pools, and of the KV pool where a transfer names it."""
        return {t.name: self._each(t, "load", extra_info) for t in transfers}

    def batch_set_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[Any, Any]:
        """Store pages of side pools."""
        return {t.name: self._each(t, "save", extra_info) for t in transfers}

    def _each(self, transfer: Any, act: str, extra_info: Any) -> list[bool]:
        keys, indices = transfer.keys or [], transfer.host_indices
        if transfer.name == PoolName.KV:
            kv = self.batch_get_v1 if act == "load" else self.batch_set_v1
            return kv(keys, indices, extra_info)
        stores = self._sides.get(transfer.name) if self._ready() is not None else None
        if not stores or indices is None:
            return none_found(keys)
        came = [getattr(store, act)(keys, indices) for store in stores]
        return [all(parts) for parts in zip(*came, strict=True)]

    def _restorable(self, transfer: Any, keys: Sequence[str]) -> list[int]:
        """Lengths of prefixes, in pages, of which a side pool has what its policy wants."""
        stores = self._sides.get(transfer.name)
        if not stores:
            return []
        has = [all(parts) for parts in zip(*(s.each(keys) for s in stores), strict=True)]
        if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
            window = max(1, len(transfer.keys or ()))
            return [n for n in range(1, len(keys) + 1) if all(has[max(0, n - window) : n])]
        if transfer.hit_policy != PoolHitPolicy.ALL_PAGES:
            say_once(f"pool {transfer.name} wants {transfer.hit_policy}, which is not known here")
            return []
        return list(range(1, (has.index(False) if False in has else len(has)) + 1))

    # -- SGLang's other calls ------------------------------------------------------------------

    def clear(self) -> None:
        """Delete what is stored, as `tierloom.reset` says."""
        how = self.said.settings.reset
        if how != "none":
            for store in self._all():
                store.clear(local=how == "local")

    def get_stats(self) -> Any:
        """Pages and GB/s since the last call, for SGLang's metrics."""
        from sglang.srt.observability.metrics_collector import StorageMetrics

        (loaded, fast), (saved, slow) = self._loads.take(), self._saves.take()
        return StorageMetrics(
            prefetch_pgs=loaded, backup_pgs=saved, prefetch_bandwidth=fast, backup_bandwidth=slow
        )

    def close(self) -> None:
        """End what is under way, close the tiers, free the memory; SGLang's pools are its own."""
        self.off = "it was closed"
        if self._door is not None:
            self._door.close()
        for store in self._all():
            store.close()
        self._store = None
        self._sides.clear()

    # SGLang calls these where `interface_v1` is not set, which was refused.

    def exists(self, key: str) -> bool:
        return bool(self.batch_exists([key]))

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        return None

    def batch_get(
        self, keys: Sequence[str], target_locations: Any = None, target_sizes: Any = None
    ) -> Any:
        return [None] * len(keys)

    def set(
        self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool:
        return False

    def batch_set(
        self, keys: Sequence[str], values: Any = None, target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:  # fmt: skip
        return False

    def _ready(self) -> PageStore | None:
        """The KV pool's store, unless nothing is stored any more."""
        if self._store is not None and not self.off and self._weights.changed:
            self.off = "the engine's weights were changed, and nothing says what they are now"
            log.warning(
                "nothing is stored any more: %s; detach and attach the storage backend with "
                "tierloom.weights set to a content id of the new ones", self.off,
            )  # fmt: skip
        return None if self.off else self._store

    def _all(self) -> list[PageStore]:
        first = [self._store] if self._store is not None else []
        return [*first, *(store for stores in self._sides.values() for store in stores)]

    def _warn_of_replicas(self) -> None:
        """SGLang lets the first rank alone write what all have; the others then want a tier that
        all can read."""
        c, tiers = self.config, (t for store in self._all() for t in store.pipeline.tiers.values())
        if c.is_mla_model and c.tp_size > 1 and all(tier.local for tier in tiers):
            log.warning(
                "of a latent that all %d ranks have, SGLang lets only the first write, and every "
                "tier here is a rank's own: nothing will be hit; use a tier that all can read "
                "(server, redis, s3, ...)", c.tp_size,
            )  # fmt: skip
