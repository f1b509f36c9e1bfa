"""Our backend between SGLang's own host pool and tiers of the test's choice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, HiCacheStorageExtraInfo
from sglang.srt.mem_cache.utils import get_hash_str, storage_namespace_seed

from tierloom.adapters.sglang.hicache import TierloomHiCache

PAGE, PER_CHUNK = 4, 4
"""As in `conftest.py`; chunks of 16 tokens."""
CHUNK = PAGE * PER_CHUNK

BASE: dict[str, Any] = {
    "backend_name": "tierloom", "module_path": "tierloom.adapters.sglang.hicache",
    "class_name": "TierloomHiCache", "interface_v1": 1, "tierloom.config": "minimal",
    "chunk.tokens": CHUNK, "chunk.group": 2, "tiers.hot.capacity": "16 MiB",
    "budget.arena": "8 MiB",
}  # fmt: skip


def on_disk(folder: Any, **more: Any) -> dict[str, Any]:
    """Memory over a disk in `folder`."""
    disk = {
        "tiers.warm.path": str(folder), "tiers.warm.capacity": "64 MiB",
        "tiers.warm.segment": "16 MiB", "tiers.warm.keep_free": "1 MiB",
        "graphs.store.stages.warm.when_full": "block", "graphs.store.deadline": "30 s",
        "graphs.retrieve.deadline": "30 s",
    }  # fmt: skip
    return BASE | {"tierloom.config": "tiered"} | disk | more


def storage_config(extra: dict[str, Any] | None = None, **more: Any) -> Any:
    """What SGLang tells a backend of one process that is alone."""
    said = {
        "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0,
        "attn_cp_size": 1, "is_mla_model": False, "enable_storage_metrics": False,
        "is_page_first_layout": False, "model_name": "some/model",
    }  # fmt: skip
    return HiCacheStorageConfig(**said | more, extra_config=dict(BASE if extra is None else extra))


def backend(host: Any, extra: dict[str, Any] | None = None, **more: Any) -> TierloomHiCache:
    """As SGLang makes and registers it."""
    made = TierloomHiCache(storage_config(extra, **more), {})
    made.register_mem_pool_host(host)
    made.on_host_pools_registered()
    return made


def info(prefix: list[str] | None) -> Any:
    return HiCacheStorageExtraInfo(prefix_keys=prefix)


def hashes(tokens: list[int], salt: str | None = None) -> list[str]:
    """The names of a prompt's pages, by SGLang's own hash."""
    found = get_hash_str(tokens, storage_namespace_seed(None, salt), PAGE)
    return list(found) if isinstance(found, list) else [found]


@dataclass
class Prompt:
    """A prompt whose pages lie in a host pool, filled with noise."""

    host: Any
    tokens: list[int]
    salt: str | None = None
    slots: torch.Tensor = field(init=False)
    keys: list[str] = field(init=False)
    content: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.keys = hashes(self.tokens, self.salt)
        self.slots = self.host.alloc(len(self.tokens))
        assert self.slots is not None, "the test's host pool is too small"
        for i in range(len(self.keys)):
            page = torch.randn_like(self.host.get_dummy_flat_data_page().float())
            self.host.set_from_flat_data_page(self.at(i), page.to(self.host.dtype))
        self.content = [self.host.get_data_page(self.at(i)).clone() for i in range(len(self.keys))]

    def at(self, page: int) -> int:
        return int(self.slots[page * PAGE])

    def save(self, to: Any, first: int = 0, last: int | None = None, *, known: bool = True) -> Any:
        last = len(self.keys) if last is None else last
        return to.batch_set_v1(
            self.keys[first:last], self.slots[first * PAGE : last * PAGE],
            info(self.keys[:first] if known else None),
        )  # fmt: skip

    def count(self, where: Any, first: int = 0) -> int:
        return int(where.batch_exists(self.keys[first:], info(self.keys[:first] or None)))

    def loaded(self, from_: Any, first: int = 0, last: int | None = None) -> int:
        """Load into fresh pages; how many came, each of which must be what was stored, and the
        others untouched."""
        last = len(self.keys) if last is None else last
        slots = self.host.alloc((last - first) * PAGE)
        assert slots is not None
        blank = torch.full_like(self.host.get_dummy_flat_data_page(), 7)
        for i in range(last - first):
            self.host.set_from_flat_data_page(int(slots[i * PAGE]), blank.clone())
        came = from_.batch_get_v1(self.keys[first:last], slots, info(self.keys[:first] or None))
        assert len(came) == last - first
        good = came.index(False) if False in came else len(came)
        assert not any(came[good:])
        for i in range(last - first):
            page = self.host.get_data_page(int(slots[i * PAGE]))
            if i < good:
                assert torch.equal(page, self.content[first + i]), f"page {first + i} is wrong"
        self.host.free(slots)
        return good


def prompt(host: Any, pages: int, *, seed: int = 1, salt: str | None = None) -> Prompt:
    return Prompt(host, [(seed * 7919 + i * i) % 50_000 for i in range(pages * PAGE)], salt)
