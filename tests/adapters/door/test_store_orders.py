"""Orders to `tierloom serve`: a store of many namespaces, which knows no model."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from store_server import Within

from tierloom.adapters.server.serve import _door
from tierloom.stages.errors import InputError, Lost
from tierloom.testing import NAMESPACE, SIZE, key_of, make_object

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OTHER = b"o" * 32
SMALL = {"hot": {"use": "memory", "capacity": 8 * SIZE}}


class Store:
    """In this process; everything that it is told, it is told from another loop."""

    def __init__(self, path: Path) -> None:
        self.within = Within(path, tiers=SMALL)

    def put(self, seed: int, space: bytes = NAMESPACE) -> Lost | None:
        async def put() -> Lost | None:
            store = self.within.serving.store
            obj = make_object(store.arena, seed)
            try:
                return await store.put(space, obj)
            finally:
                obj.lease.release()

        found: Lost | None = self.within.call(put)
        return found

    def order(self, name: str, **said: Any) -> dict[str, Any]:
        return asyncio.run(self.within.serving.order(name, said))

    def has(self, seed: int, space: bytes = NAMESPACE) -> bool:
        return bool(self.within.call(self.within.serving.store.exists, space, [key_of(seed)])[0])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "socket")
    yield made
    made.within.stop()


def test_one_namespace_goes_and_the_other_stays(store: Store) -> None:
    for seed in range(3):
        store.put(seed), store.put(seed, OTHER)
    usage = store.order("usage")
    assert {s: n["objects"] for s, n in usage["namespaces"].items()} == {
        NAMESPACE.hex(): 3, OTHER.hex(): 3,
    }  # fmt: skip
    with pytest.raises(InputError, match="knows no models"):
        store.order("clear", model="m")
    with pytest.raises(InputError, match="whole namespace"):
        store.order("clear", chunks=[key_of(1).hex()])
    body = {"chunks": [key_of(1).hex()], "namespace": OTHER.hex(), "dry_run": False}
    assert store.order("clear", **body)["objects"] == 1
    assert not store.has(1, OTHER)
    assert store.has(1)
    said = store.order("clear", namespace=NAMESPACE.hex()[:8], dry_run=False)
    assert said["objects"] == 3
    assert [store.has(s, OTHER) for s in range(3)] == [True, False, True]


def test_a_pin_holds_while_others_are_evicted_and_ends_by_itself(store: Store) -> None:
    store.put(0)
    body = {"chunks": [key_of(0).hex()], "namespace": NAMESPACE.hex(), "owner": "me"}
    assert store.order("pin", ttl="10 min", **body)["objects"] == 1
    for seed in range(1, 20):
        assert store.put(seed) is None
    assert store.has(0)
    store.order("unpin", owner="somebody else")
    for seed in range(20, 40):
        store.put(seed)
    assert store.has(0)
    store.order("unpin", owner="me")
    store.order("pin", ttl="50 ms", **body)
    end = time.monotonic() + 20
    while store.order("usage")["owners"] and time.monotonic() < end:
        time.sleep(0.02)
    for seed in range(40, 60):
        store.put(seed)
    assert not store.has(0)


def test_half_of_a_tier_can_be_pinned(store: Store) -> None:
    for seed in range(8):
        store.put(seed)
    body = {"namespace": NAMESPACE.hex(), "owner": "me", "ttl": "10 min"}
    said = store.order("pin", chunks=[key_of(s).hex() for s in range(9)], **body)
    assert (said["objects"], said["absent"], said["no_room"]) == (4, 1, 4)
    assert store.put(9) is None


def test_frozen_and_bypassed(store: Store) -> None:
    store.put(0)
    store.order("freeze")
    assert store.put(1) is Lost.REFUSED
    assert store.has(0)
    store.order("bypass", tiers=["hot"])
    assert not store.has(0)
    store.order("freeze", on=False)
    assert store.put(1) is Lost.REFUSED
    store.order("bypass", tiers=["hot"], on=False)
    assert store.has(0)
    assert store.put(1) is None


def test_serve_takes_orders_by_its_door(store: Store) -> None:
    with _door("127.0.0.1:0", store.within.serving, "", None, None).start() as door:
        said = httpx.post(f"{door.url}/v1/freeze", json={}, trust_env=False, timeout=20)
        assert said.json()["parts"] == {
            "store": {"frozen": ["hot"], "bypassed": [], "draining": False}
        }
        body = {"chunks": [key_of(0).hex()], "owner": "me", "ttl": "1 s"}
        said = httpx.post(f"{door.url}/v1/pin", json=body, trust_env=False, timeout=20)
        assert said.status_code == 422
        assert "say with chunks which is meant" in said.text
