"""Side pools (a window's, a state's, a draft's): objects of their own kind, and a prefix as long as
all pools have it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from awkward import Mood, over
from backend import BASE, PAGE, backend, info, on_disk, prompt
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer
from test_hicache import settle

if TYPE_CHECKING:
    from collections.abc import Callable

    Pools = Callable[..., tuple[Any, Any]]


class States:
    """A state per page, of two parts of different size, as Mamba's pool has it."""

    page_size, layout, dtype = 1, "layer_first", torch.float32

    def __init__(self, size: int) -> None:
        self.size = size
        self.conv = torch.randn(3, size, 24)
        self.temporal = torch.randn(3, size, 64)

    def get_page_buffer_meta(self, slots: torch.Tensor) -> tuple[list[int], list[int]]:
        starts, sizes = [], []
        for slot in slots.tolist():
            for part in (self.conv, self.temporal):
                for layer in part:
                    starts.append(layer[slot].data_ptr())
                    sizes.append(layer[slot].nbytes)
        return starts, sizes


def settle_all(storage: Any) -> None:
    for store in storage._all():
        settle(SimpleNamespace(_store=store))


def with_sides(host_pool: Pools, folder: Path) -> tuple[Any, Any, Any, States]:
    host, _ = host_pool("mha", "layer_first", slots=512)
    window, _ = host_pool("mha", "page_first", slots=512, layers=2)
    states = States(64)
    storage = backend(host, on_disk(folder))
    storage.register_mem_host_pool_v2(host, PoolName.KV)
    storage.register_mem_host_pool_v2(window, PoolName.SWA)
    storage.register_mem_host_pool_v2(states, PoolName.MAMBA)
    storage.on_host_pools_registered()
    return storage, host, window, states


def test_they_come_back_after_a_restart(host_pool: Pools, tmp_path: Path) -> None:
    storage, host, window, states = with_sides(host_pool, tmp_path)
    text, view = prompt(host, 12), prompt(window, 12)
    assert view.keys == text.keys
    text.save(storage)
    saved = storage.batch_set_v2(
        [
            PoolTransfer(PoolName.SWA, host_indices=view.slots[4 * PAGE :], keys=text.keys[4:]),
            PoolTransfer(PoolName.MAMBA, host_indices=torch.tensor([5]), keys=[text.keys[11]]),
        ],
        info(text.keys[:4]),
    )
    assert saved == {PoolName.SWA: [True] * 8, PoolName.MAMBA: [True]}
    settle_all(storage)
    conv, temporal = states.conv[:, 5].clone(), states.temporal[:, 5].clone()
    storage.close()
    states.conv.zero_()
    states.temporal.zero_()
    again = backend(host, on_disk(tmp_path))
    again.register_mem_host_pool_v2(window, PoolName.SWA)
    again.register_mem_host_pool_v2(states, PoolName.MAMBA)
    slots = window.alloc(8 * PAGE)
    got = again.batch_get_v2(
        [
            PoolTransfer(PoolName.SWA, host_indices=slots, keys=text.keys[4:]),
            PoolTransfer(PoolName.MAMBA, host_indices=torch.tensor([9]), keys=[text.keys[11]]),
        ]
    )
    assert got == {PoolName.SWA: [True] * 8, PoolName.MAMBA: [True]}
    for i in range(8):
        assert torch.equal(window.get_data_page(int(slots[i * PAGE])), view.content[4 + i])
    assert torch.equal(states.conv[:, 9], conv)
    assert torch.equal(states.temporal[:, 9], temporal)
    assert not states.conv[:, :9].any()
    assert text.loaded(again) == 12
    again.close()


@pytest.mark.parametrize(
    ("policy", "kept", "trailing", "expected"),
    [
        (PoolHitPolicy.ALL_PAGES, range(12), 1, list(range(1, 13))),
        (PoolHitPolicy.ALL_PAGES, range(5), 1, list(range(1, 6))),
        (PoolHitPolicy.ALL_PAGES, [], 1, []),
        (PoolHitPolicy.TRAILING_PAGES, [3, 11], 1, [4, 12]),
        (PoolHitPolicy.TRAILING_PAGES, [2, 3, 4, 9], 2, [4, 5]),
        (PoolHitPolicy.TRAILING_PAGES, [], 1, []),
        (PoolHitPolicy.BLOCK_GROUPS, range(12), 1, []),
    ],
)
def test_a_prefix_is_as_long_as_all_pools_have_it(
    host_pool: Pools, tmp_path: Path, policy: Any, kept: Any, trailing: int, expected: list[int]
) -> None:
    storage, host, window, _ = with_sides(host_pool, tmp_path)
    text, view = prompt(host, 12), prompt(window, 12)
    text.save(storage)
    settle(storage)
    for i in kept:
        at = view.slots[i * PAGE : (i + 1) * PAGE]
        storage.batch_set_v2([PoolTransfer(PoolName.SWA, host_indices=at, keys=[text.keys[i]])])
    settle_all(storage)
    asked = PoolTransfer(PoolName.SWA, keys=text.keys[12 - trailing :], hit_policy=policy)
    found = storage.batch_exists_v2(text.keys, [asked], info(None))
    assert found.restorable_prefix_pages == expected
    assert found.kv_hit_pages == (expected[-1] if expected else 0)
    assert found.extra_pool_hit_pages.get(PoolName.KV) == 12
    assert storage.batch_exists_v2(text.keys, [], info(None)).kv_hit_pages == 12
    storage.close()


def test_a_transfer_is_one_request(
    host_pool: Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many its pages: a tier that hangs costs one deadline, not one for each page."""
    storage, host, window, _ = with_sides(host_pool, tmp_path)
    text, view = prompt(host, 12), prompt(window, 12)
    (side,) = storage._sides[PoolName.SWA]
    calls: list[str] = []
    for name in ("store", "retrieve"):
        real = getattr(side.pipeline, name)

        def counted(*args: Any, real: Any = real, name: str = name, **named: Any) -> Any:
            calls.append(name)
            return real(*args, **named)

        monkeypatch.setattr(side.pipeline, name, counted)
    transfer = PoolTransfer(PoolName.SWA, host_indices=view.slots, keys=text.keys)
    assert storage.batch_set_v2([transfer]) == {PoolName.SWA: [True] * 12}
    settle_all(storage)
    assert storage.batch_get_v2([transfer]) == {PoolName.SWA: [True] * 12}
    assert calls == ["store", "retrieve"]
    storage.close()


def test_a_window_in_a_store_far_away(host_pool: Pools) -> None:
    """Each page is asked for, holes or not; of a store that hangs nothing is said to be there."""
    host, _ = host_pool("mha", "layer_first", slots=256)
    window, _ = host_pool("mha", "page_first", slots=256, layers=2)
    far = {k: v for k, v in BASE.items() if not k.startswith("tiers.")} | over()
    storage = backend(host, far | {"tierloom.wait": "20 s", "tiers.cold.timeout": "20 s"})
    storage.register_mem_host_pool_v2(window, PoolName.SWA)
    view = prompt(window, 8)
    for i in (2, 3, 6):
        at = view.slots[i * PAGE : (i + 1) * PAGE]
        storage.batch_set_v2([PoolTransfer(PoolName.SWA, host_indices=at, keys=[view.keys[i]])])
    settle_all(storage)
    (side,) = storage._sides[PoolName.SWA]
    side.pipeline._portal.call(side.pipeline.tiers["hot"].clear)
    assert side.each(view.keys) == [i in (2, 3, 6) for i in range(8)]
    side._wait, Mood.stuck = 0.05, 1.0
    assert side.each(view.keys) == [False] * 8
    Mood.well()
    storage.close()


def test_a_pool_that_is_not_there(host_pool: Pools, tmp_path: Path) -> None:
    storage, host, _, _ = with_sides(host_pool, tmp_path)
    text = prompt(host, 4)
    text.save(storage)
    settle(storage)
    draft = PoolTransfer(PoolName.DRAFT, keys=text.keys, host_indices=text.slots)
    assert storage.batch_exists_v2(text.keys, [draft], info(None)).kv_hit_pages == 0
    assert storage.batch_get_v2([draft]) == {PoolName.DRAFT: [False] * 4}
    assert storage.batch_set_v2([draft]) == {PoolName.DRAFT: [False] * 4}
    short = PoolTransfer(PoolName.SWA, keys=text.keys, host_indices=text.slots[:3])
    assert storage.batch_get_v2([short]) == {PoolName.SWA: [False] * 4}
    none = PoolTransfer(PoolName.SWA, keys=text.keys, host_indices=None)
    assert storage.batch_set_v2([none]) == {PoolName.SWA: [False] * 4}
    kv = PoolTransfer(PoolName.KV, keys=text.keys, host_indices=text.slots)
    assert storage.batch_get_v2([kv]) == {PoolName.KV: [True] * 4}
    storage.close()


def test_a_pool_whose_pages_are_not_evenly_spaced(
    host_pool: Pools, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage, host, _, states = with_sides(host_pool, tmp_path)

    class Uneven(States):
        def get_page_buffer_meta(self, slots: torch.Tensor) -> tuple[list[int], list[int]]:
            starts, sizes = super().get_page_buffer_meta(slots)
            return [s + int(slots[0]) ** 2 for s in starts], sizes

    storage.register_mem_host_pool_v2(Uneven(64), "odd")
    assert "not evenly spaced" in caplog.text
    assert storage.batch_get_v2(
        [PoolTransfer("odd", keys=["0" * 64], host_indices=torch.tensor([1]))]
    ) == {"odd": [False]}
    text = prompt(host, 4)
    text.save(storage)
    settle(storage)
    assert text.loaded(storage) == 4
    storage.close()
