"""KV events for routers: which of vLLM's blocks are stored outside the engine, and in what medium.

Named by vLLM's own block hashes, as it publishes them itself. The hashes of chunks that were stored
before this engine began are unknown until a request has them, so these are left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash as external

from tierloom.adapters.vllm.scheduler.side import SchedulerSide

_MEDIA = {"memory": "CPU", "disk": "STORAGE", "files": "STORAGE"}


class DescribedChunk(NamedTuple):
    """A chunk as vLLM's events describe it."""

    hashes: list[Any]
    parent: Any
    tokens: list[int]
    lora: Any


class Events:
    """Collects events on the scheduler's thread; `take` hands them out."""

    def __init__(self, scheduler: SchedulerSide, block: int) -> None:
        """`block`: tokens of a block hash."""
        self._scheduler, self._block = scheduler, block
        self._named: dict[bytes, DescribedChunk] = {}
        self._out: list[Any] = []

    @classmethod
    def of(cls, vllm_config: Any, scheduler: SchedulerSide) -> Events | None:
        """None if nobody subscribed to events."""
        config = vllm_config.kv_events_config
        if config is None or not config.enable_kv_cache_events or scheduler.saves is None:
            return None
        events = cls(scheduler, scheduler.hash_block)
        scheduler.reports.on_change = events.changed
        scheduler.saves.on_save = events.saving
        return events

    def saving(self, request: Any, start: int, end: int, keys: list[bytes]) -> None:
        """A save is planned: from now on these keys have block hashes."""
        chunk, block = self._scheduler.info.chunk, self._block
        for i, key in enumerate(keys):
            first = (start + i * chunk) // block
            last = min(start + (i + 1) * chunk, end) // block
            hashes = [external(h) for h in request.block_hashes[first:last]]
            if hashes:
                parent = external(request.block_hashes[first - 1]) if first else None
                tokens = list(request.all_token_ids[first * block : last * block])
                self._named[key] = DescribedChunk(hashes, parent, tokens, request.lora_request)

    def changed(self, key: bytes, kept: bool, tier: str) -> None:
        """A chunk can be loaded from now on, or no longer."""
        named = self._named.get(key) if kept else self._named.pop(key, None)
        if named is None:
            return
        medium = _MEDIA.get(self._scheduler.info.uses.get(tier, ""), tier)
        if not kept:
            self._out.append(BlockRemoved(block_hashes=named.hashes, medium=medium))
            return
        self._out.append(
            BlockStored(
                block_hashes=named.hashes, parent_block_hash=named.parent,
                token_ids=named.tokens, block_size=self._block,
                lora_id=named.lora.lora_int_id if named.lora else None, medium=medium,
                lora_name=named.lora.lora_name if named.lora else None, ownership="tierloom",
            )
        )  # fmt: skip

    def take(self) -> list[Any]:
        """The events since the last call."""
        out, self._out = self._out, []
        return out
