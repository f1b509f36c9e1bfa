"""The HiCache backend with SGLang's own classes: pages go out of its host pool and come back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from backend import BASE, PAGE, PER_CHUNK, backend, info, on_disk, prompt

from tierloom.adapters.sglang.weights_watch import WeightsWatch

if TYPE_CHECKING:
    from collections.abc import Callable

    Pools = Callable[..., tuple[Any, Any]]

LAYOUTS = [
    (kind, layout)
    for kind in ("mha", "mla")
    for layout in ("layer_first", "page_first", "page_first_direct", "page_head")
    if (kind, layout) != ("mla", "page_head")
]
WAYS = [(kind, layout, io) for kind, layout in LAYOUTS for io in ("direct", "kernel")]


@pytest.mark.parametrize(("kind", "layout", "io"), WAYS)
def test_through_the_controller(
    host_pool: Pools, controller: Callable[..., Any], kind: str, layout: str, io: str
) -> None:
    """Written, found and prefetched by SGLang's own threads, from any page on."""
    host, device = host_pool(kind, layout, slots=256)
    control = controller(host, device, BASE, io_backend=io)
    text = prompt(host, 22)
    for first, last in ((0, 5), (5, 22)):
        control.write_storage(
            text.slots[first * PAGE : last * PAGE], text.tokens[first * PAGE : last * PAGE],
            text.keys[first:last], prefix_keys=text.keys[:first],
        )  # fmt: skip
        done = control.ack_backup_queue.get(timeout=20)
        assert done.completed_tokens == (last - first) * PAGE
    control.storage_backend._store.pipeline.tiers["hot"].stat()
    settle(control.storage_backend)
    for first in (0, 3, 4, 9, 21):
        after = text.tokens[first * PAGE :] + [7] * PAGE
        last = text.keys[first - 1] if first else None
        control.prefetch("a", after, last, text.keys[:first])
        asked = control.prefetch_hit_queue.get(timeout=20)
        assert asked.storage_hit_count == (22 - first) * PAGE
        asked.host_indices = control.alloc_prefetch_host_buffers(asked, asked.storage_hit_count)
        control.prefetch_buffer.put(asked)
        came = 0
        while True:
            ack = control.ack_prefetch_queue.get(timeout=20)
            came = came if ack.completed_tokens is None else ack.completed_tokens
            if ack.completed_req:
                break
        assert came == (22 - first) * PAGE
        for i in range(22 - first):
            page = host.get_data_page(int(asked.host_indices[i * PAGE]))
            assert torch.equal(page, text.content[first + i])
        host.free(asked.host_indices)


def settle(storage: Any) -> None:
    """Until no store is under way."""
    runner = storage._store.pipeline._runners["store"]
    end = time.monotonic() + 20
    while runner.open and time.monotonic() < end:
        time.sleep(0.005)
    assert not runner.open


@pytest.mark.parametrize("pages", [0, 1, 3, 4, 5, 127, 128, 129])
def test_as_many_pages_as_come(host_pool: Pools, pages: int) -> None:
    host, _ = host_pool("mha", "layer_first", slots=1024)
    storage, text = backend(host), prompt(host, pages)
    assert text.save(storage) == [True] * pages
    settle(storage)
    assert text.count(storage) == pages
    assert text.loaded(storage) == pages
    storage.close()


def test_the_door_of_the_first_rank(host_pool: Pools) -> None:
    host, _ = host_pool("mha", "layer_first", slots=256)
    storage, text = backend(host, BASE | {"tierloom.http": "127.0.0.1:0"}), prompt(host, 8)
    assert storage._door is not None
    assert text.save(storage) == [True] * 8
    said = httpx.get(f"{storage._door.url}/v1/stats", trust_env=False).json()
    stored = said["parts"]["0"]["measured"]["requests"]["store"]
    assert (said["status"], stored["tokens"]) == ("ready", 8 * PAGE)
    storage.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{storage._door.url}/livez", trust_env=False)


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7])
def test_a_prompt_that_comes_page_by_page_is_joined(host_pool: Pools, step: int) -> None:
    host, _ = host_pool("mha", "page_first", slots=256)
    storage, text = backend(host), prompt(host, 21)
    for first in range(0, 21, step):
        assert all(text.save(storage, first, min(21, first + step)))
    settle(storage)
    index = storage._store.pipeline.tiers["hot"].tier._index
    whole = [e for e in index if len(e.links) == 32 * PER_CHUNK]
    assert len(whole) == 21 // PER_CHUNK
    for first in range(21):
        assert text.count(storage, first) == text.loaded(storage, first) == 21 - first
    storage.close()


def test_what_another_prompt_has_in_common(host_pool: Pools) -> None:
    host, _ = host_pool("mha", "layer_first", slots=256)
    storage, text = backend(host), prompt(host, 10)
    other = type(text)(host, text.tokens[: 6 * PAGE] + [9] * 4 * PAGE)
    text.save(storage)
    settle(storage)
    assert other.count(storage) == 6
    assert other.keys[:6] == text.keys[:6]
    other.content[:6] = text.content[:6]
    assert other.loaded(storage) == 6
    storage.close()


def test_it_is_there_after_a_restart(host_pool: Pools, tmp_path: Path) -> None:
    host, _ = host_pool("mha", "page_first_direct", slots=256)
    first = backend(host, on_disk(tmp_path))
    text = prompt(host, 18)
    text.save(first, 0, 7)
    text.save(first, 7, 18)
    settle(first)
    first.close()
    assert text.count(first) == 0
    again = backend(host, on_disk(tmp_path))
    assert text.count(again) == text.loaded(again) == 18
    assert text.loaded(again, 5) == 13
    again.close()


def test_layouts_share_what_they_keep(host_pool: Pools, tmp_path: Path) -> None:
    one, _ = host_pool("mha", "layer_first", slots=256)
    other, _ = host_pool("mha", "page_head", slots=256)
    first = backend(one, on_disk(tmp_path))
    text = prompt(one, 9)
    text.save(first)
    settle(first)
    first.close()
    second = backend(other, on_disk(tmp_path))
    slots = other.alloc(9 * PAGE)
    assert all(second.batch_get_v1(text.keys, slots, info(None)))
    for i in range(9):
        at, to = text.at(i), int(slots[i * PAGE])
        for layer in range(3):
            expected = one.k_buffer[layer][at : at + PAGE]
            assert torch.equal(other.k_buffer[to // PAGE, :, :, layer].transpose(0, 1), expected)
    second.close()


def test_who_does_not_say_where_pages_are_is_told(
    host_pool: Pools, caplog: pytest.LogCaptureFixture
) -> None:
    host, _ = host_pool("mha", "layer_first", slots=256)
    storage, text = backend(host), prompt(host, 9)
    assert text.save(storage, known=False) == [False] * 9
    assert "hicache_storage_pass_prefix_keys" in caplog.text
    storage.close()


def test_with_pages_as_chunks_it_need_not_say(host_pool: Pools) -> None:
    host, _ = host_pool("mha", "layer_first", slots=256)
    storage, text = backend(host, BASE | {"chunk.tokens": PAGE}), prompt(host, 9)
    assert all(text.save(storage, 0, 4, known=False))
    assert all(text.save(storage, 4, 9, known=False))
    settle(storage)
    assert storage.batch_exists(text.keys[3:], info(None)) == 6
    assert text.loaded(storage) == 9
    storage.close()


@pytest.mark.parametrize("how", ["shuffled", "shifted", "short"])
def test_slots_that_are_not_pages(host_pool: Pools, how: str) -> None:
    host, _ = host_pool("mha", "layer_first", slots=256)
    storage, text = backend(host), prompt(host, 4)
    slots = {
        "shuffled": text.slots.flip(0), "shifted": text.slots + 1, "short": text.slots[:-1],
    }[how]  # fmt: skip
    assert storage.batch_set_v1(text.keys, slots, info([])) == [False] * 4
    assert storage.batch_get_v1(text.keys, slots, info([])) == [False] * 4
    settle(storage)
    assert text.count(storage) == 0
    storage.close()


def test_names_that_are_no_hashes_are_a_miss(host_pool: Pools) -> None:
    host, _ = host_pool("mha", "layer_first", slots=256)
    storage, text = backend(host), prompt(host, 2)
    for keys in (["x", "y"], ["ab", "cd"], ["", ""], ["0" * 64, "0" * 62]):
        assert storage.batch_set_v1(keys, text.slots, info([])) == [False, False]
        assert storage.batch_exists(keys, info([])) == 0
        assert storage.batch_get_v1(keys, text.slots, info([])) == [False, False]
    storage.close()


def test_salts_part_tenants(host_pool: Pools) -> None:
    host, _ = host_pool("mha", "layer_first", slots=256)
    storage = backend(host)
    one = prompt(host, 6)
    other = prompt(host, 6, salt="a tenant")
    assert one.tokens == other.tokens
    one.save(storage)
    settle(storage)
    assert (one.count(storage), other.count(storage)) == (6, 0)
    storage.close()


def test_clear(host_pool: Pools) -> None:
    host, _ = host_pool("mha", "layer_first", slots=256)
    for how, left in (("local", 0), ("all", 0), ("none", 6)):
        storage, text = backend(host, BASE | {"tierloom.reset": how}), prompt(host, 6)
        text.save(storage)
        settle(storage)
        storage.clear()
        assert text.count(storage) == left
        storage.close()
        host.free(text.slots)


def test_figures_for_sglang(host_pool: Pools) -> None:
    host, _ = host_pool("mha", "layer_first", slots=256)
    storage, text = backend(host), prompt(host, 6)
    text.save(storage)
    settle(storage)
    text.loaded(storage)
    told = storage.get_stats()
    assert (told.backup_pgs, told.prefetch_pgs) == ([6], [6])
    assert min(told.backup_bandwidth + told.prefetch_bandwidth) > 0
    assert storage.get_stats().prefetch_pgs == []
    storage.close()


@pytest.mark.parametrize("how", ["a success", "one that fails half way"])
def test_new_weights_end_it(host_pool: Pools, caplog: pytest.LogCaptureFixture, how: str) -> None:
    from sglang.srt.managers.scheduler_components import weight_updater

    host, _ = host_pool("mha", "layer_first", slots=256)
    storage, text = backend(host), prompt(host, 6)
    text.save(storage)
    settle(storage)
    watch = WeightsWatch()
    changed = [
        c for c in vars(weight_updater).values()
        if isinstance(c, type) and "record_weight_version_after_update" in vars(c)
    ]  # fmt: skip
    assert len(changed) == 1
    owner = changed[0].__new__(changed[0])
    owner.scheduler = type("S", (), {"record_weight_version_change": lambda *a, **k: None})()
    if how == "a success":
        owner.record_weight_version_after_update(None)
    else:
        owner.metrics_collector = None
        with pytest.raises(OSError, match="half"), owner._observe_weight_load("disk"):
            raise OSError("half of the files were read")
    assert watch.changed
    assert text.count(storage) == 0
    assert text.save(storage) == [False] * 6
    assert text.loaded(storage) == 0
    assert "weights were changed" in caplog.text
    storage.close()


def test_bytes_are_copied_once(host_pool: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the host pool into the arena, and from the arena into the host pool, by address."""
    from tierloom.stages.ops import frame_copy

    host, _ = host_pool("mha", "page_first", slots=256)
    storage, text = backend(host), prompt(host, 8)
    seen: list[tuple[str, int]] = []
    begin, end = host.kv_buffer.data_ptr(), host.kv_buffer.data_ptr() + host.kv_buffer.nbytes
    arena = storage._store.pipeline.arena

    def watched(name: str) -> None:
        real = getattr(frame_copy, name)

        def copy(table: Any, frames: Any, *more: Any, **named: Any) -> None:
            assert ((begin <= table.base) & (table.base < end)).all()
            inside = (arena.address <= frames.address) & (
                frames.address + frames.nbytes <= arena.address + arena.total
            )
            assert inside.all()
            seen.append((name, int(frames.nbytes.sum())))
            real(table, frames, *more, **named)

        monkeypatch.setattr(frame_copy, name, copy)

    watched("gather_now")
    watched("scatter_now")
    text.save(storage)
    settle(storage)
    assert text.loaded(storage) == 8
    page = storage._store.pages.nbytes
    for name in ("gather_now", "scatter_now"):
        assert sum(n for what, n in seen if what == name) == 8 * page
    storage.close()
