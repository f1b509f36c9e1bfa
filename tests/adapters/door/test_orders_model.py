"""Orders in any order, to a real pipeline whose tiers are too small: the counts are exact, what is
pinned stays, and what is frozen does not change."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from door_rig import CHUNK, Asked, config
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import tierloom
from tierloom.pipeline.pipeline_admin import _admin_of
from tierloom.testing import Clock

OBJECT = 20 << 10
TEXTS = 12
text = st.integers(0, TEXTS - 1)
texts = st.lists(text, min_size=1, max_size=3)
tier = st.sampled_from(["hot", "cold"])
owner = st.sampled_from(["one", "two"])


def ids_of(seed: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.default_rng(seed).integers(0, 50_000, CHUNK).astype(np.int32)


class Orders(RuleBasedStateMachine):
    """Memory for 5 objects, disk for 8."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        disk = {
            "use": "disk", "path": str(Path(self.folder.name)), "capacity": 8 * OBJECT,
            "segment": "160 KiB", "keep_free": "1 MiB",
        }  # fmt: skip
        self.rig = Asked(config(hot={"use": "memory", "capacity": 5 * OBJECT}, cold=disk))
        self.pipe, self.clock = self.rig.pipe, Clock()
        admin = _admin_of(self.pipe)
        admin.leases._clock = self.clock
        self.keys: dict[int, bytes] = {}
        self.pins: dict[tuple[str, bytes], float] = {}
        self.where: dict[bytes, set[str]] = {}
        """Of what is pinned: in which tiers it must be."""
        self.frozen, self.bypassed = set[str](), set[str]()
        self.drained = False

    def teardown(self) -> None:
        self.pipe.close()
        self.folder.cleanup()

    def order(self, name: str, **said: Any) -> dict[str, Any]:
        return tierloom.administer(self.pipe, name, **said)

    def held(self) -> dict[str, set[bytes]]:
        return {n: {e.key for e in t.entries()} for n, t in self.pipe.tiers.items()}

    def living(self) -> set[bytes]:
        return {key for (_, key), until in self.pins.items() if until > self.clock()}

    @rule(seed=text)
    def store(self, seed: int) -> None:
        before = self.held()
        self.rig.store(seed)
        for name, held in self.held().items():
            for key in held - before[name]:
                self.keys[seed] = key
                assert not self.closed(name)

    @rule(seed=text)
    def retrieve(self, seed: int) -> None:
        """May promote, which is a put."""
        open_to_reads = [n for n, held in self.held().items() if n not in self.bypassed
                         and self.keys.get(seed) in held]  # fmt: skip
        assert self.rig.retrieve(seed).tokens == (CHUNK if open_to_reads else 0)

    @rule(who=owner, seeds=texts, minutes=st.integers(1, 9))
    def pin(self, who: str, seeds: list[int], minutes: int) -> None:
        keys = {self.keys[s] for s in seeds if s in self.keys}
        if not keys:
            return
        held, before = self.held(), self.leased()
        said = self.order("pin", chunks=[k.hex() for k in keys], owner=who, ttl=f"{minutes} min")
        absent = {k for k in keys if not any(k in h for h in held.values())}
        assert said["absent"] == len(absent)
        assert said["objects"] + said["absent"] + said["no_room"] == len(keys)
        now = {n: after - before[n] for n, after in self.leased().items()}
        pinned = {k for k in keys - absent if any(k in h for h in self.leased().values())}
        assert said["objects"] == len(pinned)
        for key in pinned:
            until = self.clock() + 60 * minutes
            self.pins[who, key] = max(until, self.pins.get((who, key), 0.0))
            self.where.setdefault(key, set()).update(
                n for n, h in self.leased().items() if key in h
            )
        assert set().union(*now.values()) <= keys

    @rule(who=owner, seed=st.none() | text)
    def unpin(self, who: str, seed: int | None) -> None:
        key = self.keys.get(seed, b"") if seed is not None else None
        if key == b"":
            return
        mine = {k for (o, k), until in self.pins.items() if o == who and until > self.clock()}
        mine &= {key} if key is not None else mine
        said = self.order("unpin", owner=who, chunks=[key.hex()] if key is not None else [])
        assert said["objects"] == len(mine)
        for k in mine:
            del self.pins[who, k]

    @rule(minutes=st.integers(1, 5))
    def wait(self, minutes: int) -> None:
        self.clock.now += 60 * minutes
        owners = self.order("pins")["owners"]
        alive = [o for (o, _), until in self.pins.items() if until > self.clock()]
        assert {o: row["objects"] for o, row in owners.items()} == {
            o: alive.count(o) for o in set(alive)
        }
        self.pins = {p: until for p, until in self.pins.items() if until > self.clock()}

    @rule(seeds=texts, name=tier, pinned=st.booleans(), dry=st.booleans())
    def clear(self, seeds: list[int], name: str, pinned: bool, dry: bool) -> None:
        keys = {self.keys[s] for s in seeds if s in self.keys}
        before, leased = self.held(), self.leased()
        said = self.order(
            "clear", tiers=[name], pinned=pinned, dry_run=dry,
            **({"chunks": [k.hex() for k in keys]} if keys else {"everything": True}),
        )  # fmt: skip
        meant = before[name] & keys if keys else before[name]
        goes = meant if pinned else meant - leased[name]
        assert (said["objects"], said["pinned"]) == (len(goes), len(meant - goes))
        assert said["tiers"][name]["bytes"] == OBJECT * len(goes)
        after = self.held()
        assert after[name] == before[name] - (set() if dry else goes)
        if not dry:
            for key in goes:
                self.where.get(key, set()).discard(name)

    @rule(seeds=texts)
    def prefetch(self, seeds: list[int]) -> None:
        keys = {self.keys[s] for s in seeds if s in self.keys}
        if not keys:
            return
        before = self.held()
        said = self.order("prefetch", chunks=[k.hex() for k in keys])
        there = keys & before["hot"]
        colder = (keys - there) & before["cold"] if "cold" not in self.bypassed else set()
        assert said["there"] == len(there)
        assert said["absent"] == len(keys - there - colder)
        assert said["objects"] + said["refused"] == len(colder)
        if self.closed("hot"):
            assert self.held()["hot"] == before["hot"]
            assert said["objects"] == 0
        assert self.held()["hot"] - before["hot"] <= colder

    @rule(names=st.sets(tier, max_size=2), on=st.booleans())
    def freeze(self, names: set[str], on: bool) -> None:
        meant = names or {"hot", "cold"}
        self.frozen = self.frozen | meant if on else self.frozen - meant
        self.told(self.order("freeze", tiers=sorted(names), on=on))

    @rule(name=tier, on=st.booleans())
    def bypass(self, name: str, on: bool) -> None:
        self.bypassed = self.bypassed | {name} if on else self.bypassed - {name}
        self.told(self.order("bypass", tiers=[name], on=on))

    @rule(on=st.booleans())
    def drain(self, on: bool) -> None:
        self.drained = on
        self.told(self.order("drain", on=on))

    @invariant()
    def what_is_pinned_is_there(self) -> None:
        held = self.held()
        for key in self.living():
            for name in self.where[key]:
                assert key in held[name]

    def leased(self) -> dict[str, set[bytes]]:
        return {n: {e.key for e in t.entries() if e.leased} for n, t in self.pipe.tiers.items()}

    def closed(self, name: str) -> bool:
        return name in self.frozen or name in self.bypassed or self.drained

    def told(self, said: dict[str, Any]) -> None:
        frozen = {"hot", "cold"} if self.drained else self.frozen
        assert (set(said["frozen"]), set(said["bypassed"])) == (frozen, self.bypassed)


def play(examples: int, steps: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Orders,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True,
            database=None, suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


def test_orders_in_any_order() -> None:
    play(8, 25)


@pytest.mark.campaign
def test_ten_thousand_orders() -> None:
    play(100, 100)
