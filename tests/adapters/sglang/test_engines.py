"""The real SGLang on a CPU with our storage backend, and with our linker: its answers are those of
the plain engine, and what is stored is not computed again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from real_engine import PAGE, Answer, Engine, hicache, linker, prompt

TEXTS = [(600, 1), (97, 2), (640, 3)]
"""Tokens of a prompt, and its seed; the last is a whole number of pages."""


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """Memory over a disk in `folder`."""
    return {
        "tierloom.config": "tiered", "tiers.hot.capacity": "64 MiB", "budget.arena": "64 MiB",
        "tiers.warm.path": str(folder), "tiers.warm.capacity": "512 MiB",
        "tiers.warm.segment": "64 MiB", "tiers.warm.keep_free": "1 MiB",
        "graphs.retrieve.deadline": "30 s", "graphs.store.deadline": "30 s",
    } | more  # fmt: skip


def backend(folder: Path, **more: Any) -> dict[str, Any]:
    """The extra config of our storage backend."""
    return {
        "backend_name": "tierloom", "module_path": "tierloom.adapters.sglang.hicache",
        "class_name": "TierloomHiCache", "interface_v1": 1, "prefetch_threshold": PAGE,
        "hicache_storage_pass_prefix_keys": True,
    } | settings(folder, **more)  # fmt: skip


def with_hicache(folder: Path, layout: str = "layer_first", **options: Any) -> dict[str, Any]:
    return hicache(backend(folder), layout=layout, **options)


def with_linker(folder: Path, **options: Any) -> dict[str, Any]:
    module = "tierloom.adapters.sglang.linker"
    return linker("TierloomLinker", module, settings(folder), **options)


def whole(tokens: int) -> int:
    """Tokens of a prompt that can be hit: whole pages, but for its last token."""
    return (tokens - 1) // PAGE * PAGE


def same(found: Answer, plain: Answer) -> None:
    assert found.ids == plain.ids
    assert found.logprobs == pytest.approx(plain.logprobs, abs=1e-3)


def eventually(engine: Engine, tokens: list[int], **how: Any) -> Answer:
    """Ask, with the engine's own caches emptied, until all of the prompt is hit: what was stored
    may still be on its way."""
    for _ in range(20):
        engine.flush()
        answer = engine.one(tokens, **how)
        if answer.cached == whole(len(tokens)):
            break
        time.sleep(0.2)
    return answer


@pytest.fixture(scope="session")
def plain(_engines: Engine, llama: Path) -> dict[int, Answer]:
    """What the engine says without any cache of ours."""
    engine = _engines.use(llama)
    return {seed: engine.one(prompt(n, seed), max_tokens=16) for n, seed in TEXTS}


def rounds(
    engine: Engine, model: Path, options: dict[str, Any], plain: dict[int, Answer], *, second: bool
) -> None:
    """Cold, again, after a flush, after a restart. `second`: only the second question after a
    restart hits."""
    engine.use(model, **options)
    for n, seed in TEXTS:
        tokens = prompt(n, seed)
        cold = engine.one(tokens, max_tokens=16)
        assert cold.cached == 0
        same(cold, plain[seed])
        again = engine.one(tokens, max_tokens=16)
        assert again.cached == whole(n)
        same(again, plain[seed])
    for n, seed in TEXTS:
        after = eventually(engine, prompt(n, seed), max_tokens=16)
        assert after.cached == whole(n)
        same(after, plain[seed])
    time.sleep(0.5)  # the disk's part is behind memory's
    engine.use(model, fresh=True, **options)
    for n, seed in TEXTS:
        first = engine.one(prompt(n, seed), max_tokens=16)
        same(first, plain[seed])
        if second:
            first = eventually(engine, prompt(n, seed), max_tokens=16)
            same(first, plain[seed])
        assert first.cached == whole(n)


@pytest.mark.parametrize("layout", ["layer_first", "page_first_direct"])
def test_hicache(
    engine: Engine, llama: Path, plain: dict[int, Answer], tmp_path: Path, layout: str
) -> None:
    rounds(engine, llama, with_hicache(tmp_path / "kv", layout), plain, second=False)


def test_linker(engine: Engine, llama: Path, plain: dict[int, Answer], tmp_path: Path) -> None:
    rounds(engine, llama, with_linker(tmp_path / "kv"), plain, second=True)


@pytest.mark.parametrize("how", [with_hicache, with_linker])
def test_salts_do_not_share(
    engine: Engine, llama: Path, tmp_path: Path, how: Callable[..., dict[str, Any]]
) -> None:
    engine.use(llama, **how(tmp_path / "kv"))
    tokens = prompt(400, 7)
    assert engine.one(tokens, cache_salt="one").cached == 0
    assert eventually(engine, tokens, cache_salt="one").cached == whole(400)
    engine.flush()
    assert engine.one(tokens, cache_salt="other").cached == 0
    engine.flush()
    assert engine.one(tokens).cached == 0


def test_killed_while_it_stores(
    engine: Engine, llama: Path, plain: dict[int, Answer], tmp_path: Path
) -> None:
    options = with_hicache(tmp_path / "kv")
    engine.use(llama, **options)
    for n, seed in TEXTS:
        engine.one(prompt(n, seed), max_tokens=16)
    engine.kill()
    engine.use(llama, fresh=True, **options)
    for n, seed in TEXTS:
        found = engine.one(prompt(n, seed), max_tokens=16)
        same(found, plain[seed])
        assert found.cached <= whole(n)
        assert eventually(engine, prompt(n, seed)).cached == whole(n)


def test_detached_and_attached_again(
    engine: Engine, llama: Path, plain: dict[int, Answer], tmp_path: Path
) -> None:
    extra = backend(tmp_path / "kv")
    engine.use(llama, **hicache(extra))
    tokens = prompt(600, 1)
    same(engine.one(tokens, max_tokens=16), plain[1])
    assert eventually(engine, tokens).cached == whole(600)
    for _ in range(3):
        engine.detach()
        engine.flush()
        without = engine.one(tokens, max_tokens=16)
        assert without.cached == 0
        same(without, plain[1])
        engine.attach(extra)
        found = eventually(engine, tokens, max_tokens=16)
        assert found.cached == whole(600)
        same(found, plain[1])
    engine.detach()
    with pytest.raises(AssertionError, match="does not divide"):
        engine.attach(extra | {"chunk.tokens": 48})
    same(engine.one(tokens, max_tokens=16), plain[1])
    engine.attach(extra)
    engine.clear()
    engine.flush()
    assert engine.one(tokens).cached == 0


def test_the_store_is_emptied_and_damaged_under_it(
    engine: Engine, llama: Path, plain: dict[int, Answer], tmp_path: Path
) -> None:
    """Bytes of the disk's segments are turned between a run and the next: computed, never wrong."""
    options = with_hicache(tmp_path / "kv")
    engine.use(llama, **options)
    for n, seed in TEXTS:
        engine.one(prompt(n, seed), max_tokens=16)
        assert eventually(engine, prompt(n, seed)).cached == whole(n)
    time.sleep(0.5)
    engine.stop()
    for file in (tmp_path / "kv").rglob("*"):
        if file.is_file() and file.stat().st_size > 1 << 20:
            with file.open("r+b") as f:
                for at in range(70_000, 4 << 20, 400_009):
                    f.seek(at)
                    f.write(b"\x5a")
    engine.use(llama, fresh=True, **options)
    for n, seed in TEXTS:
        found = engine.one(prompt(n, seed), max_tokens=16)
        assert found.cached <= whole(n)
        same(found, plain[seed])


def test_many_at_once(engine: Engine, llama: Path, tmp_path: Path) -> None:
    """Prompts that share their beginnings, asked at the same time, again and again."""
    engine.use(llama)
    texts = [prompt(320, 11) + prompt(64 + 16 * i, 20 + i) for i in range(6)]
    expected = [engine.one(t).ids for t in texts]
    engine.use(llama, **with_hicache(tmp_path / "kv"))
    for _ in range(3):
        assert [a.ids for a in engine.generate(*texts)] == expected
        engine.flush()
    engine.use(llama, **with_linker(tmp_path / "kv2"))
    for _ in range(3):
        assert [a.ids for a in engine.generate(*texts)] == expected
        engine.flush()


@pytest.mark.campaign
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("how", ["hicache", "linker"])
def test_twenty_prompts_of_a_real_model(
    engine: Engine, smollm2: Path, tmp_path: Path, how: str
) -> None:
    """512 to 4,096 tokens, 64 new ones; plain, cold, again, after a flush, after a restart."""
    texts = [prompt(512 + 188 * i, 100 + i, vocab=40_000) for i in range(20)]
    room = {"max_total_tokens": 10_240, "context_length": 8192, "chunked_prefill_size": 4096}
    engine.use(smollm2, **room)
    plain = [engine.one(t, max_tokens=64).ids for t in texts]
    big = {"tiers.hot.capacity": "3 GiB", "tiers.warm.capacity": "6 GiB", "budget.arena": "512 MiB"}
    extra = backend(tmp_path, **big)
    options = hicache(extra, **room) if how == "hicache" else linker(
        "TierloomLinker", "tierloom.adapters.sglang.linker", settings(tmp_path, **big), **room
    )  # fmt: skip
    engine.use(smollm2, **options)
    for tokens, ids in zip(texts, plain, strict=True):
        assert engine.one(tokens, max_tokens=64).ids == ids
        again = engine.one(tokens, max_tokens=64)
        assert (again.ids, again.cached) == (ids, whole(len(tokens)))
    for tokens, ids in zip(texts, plain, strict=True):
        after = eventually(engine, tokens, max_tokens=64)
        assert (after.ids, after.cached) == (ids, whole(len(tokens)))
    time.sleep(3)
    engine.use(smollm2, fresh=True, **options)
    for tokens, ids in zip(texts, plain, strict=True):
        found = engine.one(tokens, max_tokens=64)
        assert found.ids == ids
        if how == "linker":
            found = eventually(engine, tokens, max_tokens=64)
            assert found.ids == ids
        assert found.cached == whole(len(tokens))


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_attach_and_detach_under_clients(engine: Engine, llama: Path, tmp_path: Path) -> None:
    """SGLang refuses both while it is busy; between, they succeed, and no request fails."""
    extra = backend(tmp_path / "kv")
    engine.use(llama)
    texts = [prompt(200 + 16 * i, 50 + i) for i in range(16)]
    expected = [engine.one(t).ids for t in texts]
    engine.use(llama, **hicache(extra))
    threads = threads_of(engine.pid)
    for i in range(100):
        assert [a.ids for a in engine.generate(*texts)] == expected
        engine.detach() if i % 2 == 0 else engine.attach(extra)
    assert threads_of(engine.pid) <= threads
    assert threading.active_count() < 50


def threads_of(pid: int) -> int:
    """Threads of a process and of its children."""
    found = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(
                line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line
            )
        except OSError:
            continue
        if pid in (int(lines["Pid"]), int(lines["PPid"]), int(lines["NSpgid"].split()[0])):
            found += int(lines["Threads"])
    return found
