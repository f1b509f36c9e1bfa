"""Two servers that share one `files` folder: what one has computed, the other loads."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from harness import pipeline, prompt, transfer
from serving import Server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Reference

CHUNK = 256  # a folder that others write to is asked for whole chunks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared") / "kv"


@pytest.fixture(scope="module")
def servers(llama: Path, logs: Path, folder: Path) -> Iterator[list[Server]]:
    kv = transfer(pipeline(cold={"use": "files", "path": str(folder)}))
    up = [Server(llama, kv, logs / f"server-{i}.log") for i in range(2)]
    try:
        for server in up:
            server.wait_ready()
        yield up
    finally:
        for server in up:
            server.close()


def wait_for_objects(folder: Path, count: int) -> None:
    """Until so many objects have got their names; storing goes on behind the answer."""
    end = time.monotonic() + 60
    while sum(f.is_file() for f in folder.rglob("*")) < count:
        assert time.monotonic() < end, f"not stored: {list(folder.rglob('*'))}"
        time.sleep(0.1)
    time.sleep(0.2)


def test_one_stores_the_other_loads(
    servers: list[Server], folder: Path, reference: Reference
) -> None:
    one, other = servers
    tokens = prompt(2000, seed=450)
    right = reference(tokens)
    first = one.complete(tokens)
    assert (first["ids"], first["cached"]) == (right, 0)
    wait_for_objects(folder, 2000 // CHUNK)
    second = other.complete(tokens)
    assert second["ids"] == right
    assert second["cached"] >= 2000 // CHUNK * CHUNK
    longer = tokens + prompt(300, seed=451)
    third = other.complete(longer)
    assert third["ids"] == reference(longer)
    assert third["cached"] >= 2000 // CHUNK * CHUNK


def test_both_at_once(servers: list[Server], reference: Reference) -> None:
    """The same prompts to both, and each twice: two writers of one key do no harm."""
    prompts = [prompt(520 + 60 * i, seed=460 + i) for i in range(6)]
    right = [reference(tokens) for tokens in prompts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            asked = [pool.submit(s.complete, t) for t in prompts for s in servers]
            said = [a.result()["ids"] for a in asked]
            assert said == [ids for ids in right for _ in servers]


def test_metrics(servers: list[Server]) -> None:
    one, other = servers
    for server in servers:
        assert server.metric("vllm:tierloom_asked_tokens_total") > 0
        assert server.metric("vllm:tierloom_store_tokens_total") > 0
        assert server.metric("vllm:tierloom_store_duration_seconds_count") > 0
        assert server.metric("vllm:tierloom_tier_used_bytes") > 0
        assert server.metric("vllm:tierloom_tier_up") > 0
    assert other.metric("vllm:external_prefix_cache_hits_total") >= 2 * 1792
    assert other.metric("vllm:tierloom_load_tokens_total") >= 2 * 1792
    assert other.metric("vllm:tierloom_hit_tokens_total") >= 2 * 1792
    assert other.metric("vllm:tierloom_load_failed_tokens_total") == 0


def test_switches_travel_in_the_body(servers: list[Server], reference: Reference) -> None:
    one, _ = servers
    tokens = prompt(800, seed=470)
    for _ in range(2):
        said = one.complete(tokens, kv_transfer_params={"tierloom.skip_save": True})
        assert (said["ids"], said["cached"]) == (reference(tokens), 0)


def test_they_end_when_told_to(servers: list[Server]) -> None:
    """Last: SIGTERM ends them by themselves."""
    assert [server.close() is not None for server in servers] == [True, True]
