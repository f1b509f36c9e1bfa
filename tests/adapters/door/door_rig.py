"""A pipeline over small tensors, and what its door says."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import torch
from prometheus_client.parser import text_string_to_metric_families

import tierloom

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK = 64
OBJECT_KV = CHUNK * 2 * 4 * 2 * 8 * 2
"""Bytes of KV in a chunk: K and V, 4 layers, 2 heads of 8 values in bfloat16."""
HOT = {"use": "memory", "capacity": "32 MiB"}


def config(**tiers: dict[str, Any]) -> dict[str, Any]:
    """Tiers that are all put into, and asked in their order; the first is promoted to."""
    tiers = tiers or {"hot": HOT}
    first, *others = tiers
    puts = {name: {"use": "put", "tier": name, "from": "pack"} for name in others}
    return {
        "version": 1, "name": "test", "chunk": {"tokens": CHUNK, "grain": 16, "group": 2},
        "budget": {"arena": "8 MiB"}, "tiers": tiers,
        "graphs": {
            "store": {"deadline": "30 s", "stages": {
                "keys": {"use": "hash"}, "fresh": {"use": "lookup", "want": "absent"},
                "pack": {"use": "gather"}, first: {"use": "put", "tier": first},
                **{name: put | {"when_full": "block"} for name, put in puts.items()},
            }},
            "retrieve": {"deadline": "30 s", "stages": {
                "keys": {"use": "hash"}, "plan": {"use": "lookup"},
                "fetch": {"use": "get"} | ({"promote": first} if others else {}),
                "grow": {"use": "decode"}, "place": {"use": "scatter"},
            }},
        },
    }  # fmt: skip


class Asked:
    """A pipeline whose every request is kept, so that it can be counted by hand."""

    def __init__(self, source: dict[str, Any]) -> None:
        self.caches = [torch.randn(2, 40, 16, 2, 8).to(torch.bfloat16) for _ in range(4)]
        layout = tierloom.KVLayout.from_tensors(self.caches, order="2BNHD")
        self.pipe = tierloom.open(source, layout=layout, model="test")
        self.receipts: dict[str, list[tierloom.Receipt]] = {"store": [], "retrieve": []}

    def store(self, seed: int, chunks: int = 1) -> tierloom.Receipt:
        return self._ask("store", seed, chunks)

    def retrieve(self, seed: int, chunks: int = 1) -> tierloom.Receipt:
        return self._ask("retrieve", seed, chunks)

    def _ask(self, graph: str, seed: int, chunks: int) -> tierloom.Receipt:
        ids = np.random.default_rng(seed).integers(0, 50_000, chunks * CHUNK).astype(np.int32)
        ticket = getattr(self.pipe, graph)(ids, self.caches, np.arange(len(ids)))
        self.receipts[graph].append(ticket.wait())
        return self.receipts[graph][-1]


@contextmanager
def asked(source: dict[str, Any]) -> Iterator[Asked]:
    made = Asked(source)
    try:
        yield made
    finally:
        made.pipe.close()


def get(url: str, path: str, **options: Any) -> httpx.Response:
    return httpx.get(url + path, timeout=20, trust_env=False, **options)


def series(url: str) -> dict[tuple[str, ...], float]:
    """Every sample: its name and its labels as `label=value` in order, to its value."""
    said = get(url, "/metrics")
    assert said.status_code == 200, said.text
    return {
        (s.name, *(f"{k}={v}" for k, v in sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(said.text)
        for s in family.samples
    }
