"""What an operator asks of a running server: to forget what is kept, to pause, to sleep."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import httpx
import pytest
from harness import EngineError, prompt, transfer
from serving import Server, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Reference

RESET = "/reset_prefix_cache?reset_external=true"


@pytest.fixture(scope="module")
def server(llama: Path, logs: Path) -> Iterator[Server]:
    env = {"VLLM_SERVER_DEV_MODE": "1"}
    kv = transfer(**{"tierloom.http": f"127.0.0.1:{(door := free_port())}"})
    made = Server(llama, kv, logs / "server-reset.log", env=env)
    made.door = f"http://127.0.0.1:{door}"
    try:
        made.wait_ready()
        yield made
    finally:
        made.close()


def kept(server: Server, tokens: list[int], right: list[int]) -> None:
    """Asked until it is a hit: storing goes on after the answer."""
    for _ in range(50):
        said = server.complete(tokens)
        assert said["ids"] == right
        if said["cached"]:
            return
    raise AssertionError("never a hit")


def test_a_reset_forgets_what_is_kept(server: Server, reference: Reference) -> None:
    """On an idle server, too, which makes no step."""
    tokens = prompt(900, seed=480)
    right = reference(tokens)
    kept(server, tokens, right)
    assert json.loads(server.post(RESET)) == {"success": True}
    said = server.complete(tokens)
    assert (said["ids"], said["cached"]) == (right, 0)
    kept(server, tokens, right)


def test_the_engine_s_own_door(server: Server, reference: Reference) -> None:
    """It answers while the engine is idle, by what the worker has counted."""
    tokens = prompt(900, seed=482)
    kept(server, tokens, reference(tokens))
    assert httpx.get(f"{server.door}/readyz", trust_env=False).json()["status"] == "ready"
    stats = httpx.get(f"{server.door}/v1/stats", trust_env=False).json()
    measured = stats["parts"]["0"]["measured"]["requests"]
    for name, n in (("load_tokens", measured["retrieve"]), ("store_tokens", measured["store"])):
        assert server.metric(f"vllm:tierloom_{name}_total") == n["tokens"] > 0
    text = httpx.get(f"{server.door}/metrics", trust_env=False).text
    assert f"tierloom_load_tokens_total {measured['retrieve']['tokens']:.1f}" in text


def test_orders_by_the_engine_s_door(server: Server, reference: Reference) -> None:
    """They reach the workers, by the tokens that the engine was asked."""
    tokens = prompt(900, seed=484)
    right = reference(tokens)
    kept(server, tokens, right)

    def order(name: str, body: dict[str, object]) -> dict[str, int]:
        said = httpx.post(f"{server.door}/v1/{name}", json=body, trust_env=False, timeout=60)
        assert said.status_code == 200, said.text
        part: dict[str, int] = said.json()["parts"]["0"]
        return part

    pinned = order("pin", {"tokens": tokens, "owner": "me", "ttl": "1 h"})
    assert (pinned["absent"], pinned["no_room"]) == (0, 0)
    assert pinned["tokens"] >= 768
    left = order("clear", {"everything": True, "dry_run": False})
    assert left["pinned"] >= pinned["objects"] > 0
    assert json.loads(server.post("/reset_prefix_cache")) == {"success": True}
    assert server.complete(tokens)["cached"] > 0  # what is pinned is left
    tenants = httpx.get(f"{server.door}/v1/usage", trust_env=False).json()["parts"]["0"]["tenants"]
    assert set(tenants) - {""}
    order("unpin", {"owner": "me"})
    assert order("clear", {"salt": "", "dry_run": False})["objects"] > 0
    assert json.loads(server.post("/reset_prefix_cache")) == {"success": True}
    said = server.complete(tokens)
    assert (said["ids"], said["cached"]) == (right, 0)


def test_a_reset_of_the_engine_alone_leaves_it(server: Server, reference: Reference) -> None:
    tokens = prompt(900, seed=481)
    right = reference(tokens)
    kept(server, tokens, right)
    assert json.loads(server.post("/reset_prefix_cache")) == {"success": True}
    assert server.complete(tokens)["cached"] > 0


def test_pause_and_go_on(server: Server, reference: Reference) -> None:
    """A pause that clears caches, as for new weights, forgets what we keep, too."""
    tokens = prompt(900, seed=482)
    right = reference(tokens)
    kept(server, tokens, right)
    assert json.loads(server.post("/pause?mode=wait")) == {"status": "paused"}
    assert json.loads(server.post("/resume")) == {"status": "resumed"}
    said = server.complete(tokens)
    assert (said["ids"], said["cached"]) == (right, 0)
    kept(server, tokens, right)


def test_sleep_and_wake(server: Server, reference: Reference) -> None:
    """Where the platform can sleep; where it cannot the server says so and serves on."""
    tokens = prompt(900, seed=483)
    right = reference(tokens)
    kept(server, tokens, right)
    with contextlib.suppress(EngineError):
        server.post("/sleep?level=1")
        server.post("/wake_up")
    assert server.complete(tokens)["ids"] == right
