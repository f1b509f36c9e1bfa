"""Tiers that are stuck, down, late, or lie: every call comes back in time, and no byte is wrong."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from awkward import KEPT, Mood, over
from backend import BASE, PAGE, backend, info, on_disk, prompt
from test_hicache import settle

if TYPE_CHECKING:
    from collections.abc import Callable

    Pools = Callable[..., tuple[Any, Any]]

AMPLE = {
    "graphs.retrieve.deadline": "30 s", "graphs.store.deadline": "30 s", "tierloom.wait": "20 s",
    "tiers.cold.timeout": "20 s",
}  # fmt: skip
"""Time enough on any machine."""
AWKWARD = {k: v for k, v in BASE.items() if not k.startswith("tiers.")}


def opened(host: Any, **more: Any) -> Any:
    return backend(host, AWKWARD | over() | more)


def forget_memory(storage: Any) -> None:
    pipeline = storage._store.pipeline
    pipeline._portal.call(pipeline.tiers["hot"].clear)


def test_what_is_far_away_comes(host_pool: Pools) -> None:
    host, _ = host_pool("mha", "layer_first", slots=256)
    storage, text = opened(host, **AMPLE), prompt(host, 12)
    text.save(storage)
    settle(storage)
    forget_memory(storage)
    assert text.count(storage) == text.loaded(storage) == 12
    storage.close()
    again = opened(host, **AMPLE)
    assert text.count(again) == text.loaded(again) == 12
    again.close()


@pytest.mark.parametrize("how", ["stuck", "down", "lost", "late"])
def test_a_bad_tier_costs_a_miss(host_pool: Pools, how: str) -> None:
    host, _ = host_pool("mha", "layer_first", slots=256)
    storage, text, more = opened(host), prompt(host, 12), prompt(host, 8, seed=2)
    text.save(storage)
    settle(storage)
    forget_memory(storage)
    setattr(Mood, how, 1.0)
    Mood.delay = 5.0
    for _ in range(4):
        began = time.monotonic()
        assert text.count(storage) == 0 or how == "lost"
        assert text.loaded(storage) == 0
        assert time.monotonic() - began < 30  # it came back; how soon, the benchmark says
    assert all(more.save(storage))  # memory takes it, whatever the store does
    end = time.monotonic() + 20
    while more.count(storage) < 8 and time.monotonic() < end:
        time.sleep(0.005)
    assert more.loaded(storage) == 8
    Mood.well()
    storage.close()


def test_an_open_breaker_costs_nothing(host_pool: Pools) -> None:
    host, _ = host_pool("mha", "layer_first", slots=256)
    storage, text = opened(host, **{"tiers.cold.probe": "1 h"}), prompt(host, 8)
    text.save(storage)
    settle(storage)
    forget_memory(storage)
    Mood.stuck = 1.0
    tier = storage._store.pipeline.tiers["cold"]
    for _ in range(40):
        text.loaded(storage)
        if not tier.available:
            break
    assert not tier.available
    Mood.well()
    asked = tier.counts.hits + tier.counts.misses
    assert text.count(storage) == text.loaded(storage) == 0
    assert tier.counts.hits + tier.counts.misses == asked  # it was not even asked
    storage.close()


def test_nothing_is_written_into_a_page_after_its_call(host_pool: Pools) -> None:
    """Reads that end at the deadline, again and again, over pages that are then somebody else's."""
    rounds, host = 60, host_pool("mha", "layer_first", slots=512)[0]
    storage, text = opened(host, **{"graphs.retrieve.deadline": "20 ms"}), prompt(host, 16)
    text.save(storage)
    settle(storage)
    slots = host.alloc(16 * PAGE)
    assert slots is not None
    Mood.late, Mood.delay = 0.7, 0.02
    short = 0
    for _ in range(rounds):
        forget_memory(storage)
        came = storage.batch_get_v1(text.keys, slots, info(None))
        short += not all(came)
        for i in range(16):
            guard = torch.full_like(text.content[0], 3)
            host.set_from_flat_data_page(int(slots[i * PAGE]), guard)
        time.sleep(0.03)
        for i in range(16):
            assert (host.get_data_page(int(slots[i * PAGE])) == 3).all()
    assert short > rounds // 10
    storage.close()


def campaign(host: Any, rounds: int, folder: Path | None = None) -> int:
    """Read what was damaged in any way; how many pages came after all."""
    storage, came = opened(host), 0
    texts = [prompt(host, 8, seed=s) for s in range(4)]
    for text in texts:
        text.save(storage)
    settle(storage)
    whole = {name: bytes(data) for name, data in KEPT.items()}
    Mood.damage = 0.5
    for i in range(rounds):
        forget_memory(storage)
        text = texts[i % 4]
        came += text.loaded(storage, i % 8)  # which checks every page that came, and all others
        KEPT.update({n: bytearray(d) for n, d in whole.items()})
    storage.close()
    return came


def test_damage_is_never_placed(host_pool: Pools) -> None:
    host, _ = host_pool("mha", "layer_first", slots=512)
    assert 0 < campaign(host, 150) < 150 * 8


@pytest.mark.campaign
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_damage_is_never_placed_at_length(host_pool: Pools, kind: str) -> None:
    """Each read is of up to 2 objects, each damaged at the chance of a half: 10,000 in all."""
    host, _ = host_pool(kind, "page_first", slots=512)
    assert campaign(host, 6000) > 0


def test_each_byte_of_an_object_on_disk(host_pool: Pools, tmp_path: Path) -> None:
    """Bytes all over the disk's segments are turned, one at a time."""
    host, _ = host_pool("mha", "layer_first", slots=256)
    text, source = prompt(host, 8), random.Random(3)
    storage = backend(host, on_disk(tmp_path))
    text.save(storage)
    settle(storage)
    segment = max(tmp_path.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    used = 2 * (text.content[0].numel() * 4 * 4 + 3 * 4096)
    for _ in range(40):
        at = source.randrange(used)
        with segment.open("r+b") as f:
            f.seek(at)
            was = f.read(1)
            f.seek(at)
            f.write(bytes([was[0] ^ 0x10]))
        forget_memory(storage)
        text.loaded(storage)
        with segment.open("r+b") as f:
            f.seek(at)
            f.write(was)
        text.save(storage)
        settle(storage)
    storage.close()


def test_clear_and_detach_while_pages_are_read(host_pool: Pools) -> None:
    host, _ = host_pool("mha", "layer_first", slots=1024)
    storage = opened(host)
    texts = [prompt(host, 16, seed=s) for s in range(3)]
    for text in texts:
        text.save(storage)
    settle(storage)
    Mood.late, Mood.delay = 0.3, 0.01
    wrong: list[BaseException] = []

    def read(text: Any) -> None:
        try:
            for _ in range(25):
                text.loaded(storage, 3)
                text.count(storage)
                text.save(storage, 0, 16)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(t,)) for t in texts]
    for thread in threads:
        thread.start()
    for _ in range(5):
        time.sleep(0.05)
        storage.clear()
    storage.close()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_a_full_memory_is_a_miss(host_pool: Pools) -> None:
    host, _ = host_pool("mha", "layer_first", slots=2048)
    storage = backend(host, BASE | {"tiers.hot.capacity": "200 KiB", "budget.arena": "1 MiB"})
    for seed in range(6):
        text = prompt(host, 24, seed=seed)
        text.save(storage)
        settle(storage)
        assert 0 <= text.loaded(storage) <= 24
        host.free(text.slots)
    storage.close()
