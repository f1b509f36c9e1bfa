"""Orders to engines, by their doors. The controller remembers none of them.

An engine's door does each order once and keeps what came of it (`order_book.py`), so the state of
an order is where its effect is, and ends with it: any controller can be asked, or told again.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tierloom.adapters.controller.control_bodies import LookupBody
from tierloom.adapters.controller.fleet_view import FleetView, require_instance
from tierloom.pipeline.admin.admin_bodies import body_of
from tierloom.stages.directory.shared.described import DOOR
from tierloom.stages.directory.shared.records import WorkerRecord
from tierloom.stages.errors import InputError, TierDown
from tierloom.stages.options import parse_seconds

LONGEST = 600.0
"""Seconds that an order may take."""
_LOOK = 5.0
"""Seconds that a door may take to say what became of one."""
_WATCH = 0.5
"""Heartbeats between two looks whether an engine still lives."""
_STRICT = {"extra": "forbid"}
Call = Callable[..., Awaitable[tuple[int, Any]]]
"""(door, path, body, seconds, **headers): status and answer of a door. Raises TierDown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetOrderBody:
    """An order, and whom it is for."""

    instances: list[str]
    """Engines by name; `*`: all that live and have a door."""
    body: dict[str, Any] = field(default_factory=dict)
    """As the engine's own door takes it."""
    deadline: str = "60 s"
    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    def __post_init__(self) -> None:
        if not self.instances:
            raise InputError("instances: name at least one, or *")
        _checked(self.deadline)


@dataclass(frozen=True, kw_only=True, slots=True)
class MoveBody:
    """Chunks of a prompt that one engine has, brought to another that can read it."""

    source: str
    target: str
    tokens: list[int] = field(default_factory=list)
    chunks: list[str] = field(default_factory=list)
    salt: str = ""
    copy: bool = False
    """Leave them at the source, too."""
    deadline: str = "60 s"
    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    def __post_init__(self) -> None:
        if self.source == self.target:
            raise InputError("move: source and target are one")
        LookupBody(tokens=self.tokens, chunks=self.chunks)
        _checked(self.deadline)


@dataclass(frozen=True, slots=True)
class FleetOrder:
    """What came of an order."""

    id: str
    order: str
    state: str
    """done; running; failed, where an engine did not do it; late; lost, where one has ended, and
    with it what it knew of the order."""
    instances: dict[str, dict[str, Any]]
    """By engine: its door's own answer, or `state` and `detail`."""


@dataclass(frozen=True, slots=True)
class MoveAnswer:
    """What came of a move."""

    id: str
    state: str
    chunks: int
    """That the source had."""
    moved: int
    """That are in the target's memory now, and pinned there while the source let them go."""
    tokens: int
    steps: dict[str, FleetOrder]


class FleetOrders:
    """On the controller's loop."""

    def __init__(self, fleet: FleetView, call: Call) -> None:
        self._fleet, self._call = fleet, call

    async def send(self, order: str, body: FleetOrderBody, key: str = "") -> FleetOrder:
        """Raises InputError, TierDown (the directory does not answer)."""
        body_of(order, body.body)
        known = await self._fleet.instances()
        names = [name for name in known if door_of(known[name])]
        if body.instances != ["*"]:
            names = list(dict.fromkeys(body.instances))
            for name in names:
                require_instance(known, name)
        id = key or secrets.token_hex(8)
        sent = (self._one(n, known[n], order, body.body, id, body.deadline) for n in names)
        told = dict(zip(names, await asyncio.gather(*sent), strict=True))
        return FleetOrder(_id_of(names, id), order, _worst(told), told)

    async def look(self, id: str) -> FleetOrder:
        """What came of an order, as the engines' doors remember it. Raises InputError, TierDown."""
        names, _, key = id.rpartition("~")
        known = await self._fleet.instances()
        told: dict[str, dict[str, Any]] = {}
        for name in names.split(","):
            if name not in known:
                told[name] = _lost("it has ended: no heartbeat")
                continue
            status, said = await self._asked(known[name], f"/v1/orders/{key}", None, {}, _LOOK)
            told[name] = said if status == 200 else _lost(str(said.get("detail", said)))
        order = next((t["order"] for t in told.values() if "order" in t), "")
        return FleetOrder(id, order, _worst(told), told)

    async def move(self, body: MoveBody, key: str = "") -> MoveAnswer:
        """Nothing is deleted at the source that is not pinned at the target. Sent again with its
        key, it goes on where it was. Raises InputError, TierDown."""
        known = await self._fleet.instances()
        for name in (body.source, body.target):
            require_instance(known, name)
        keys, size = await self._kept(body), known[body.source][0].chunk
        id, steps = key or secrets.token_hex(8), dict[str, FleetOrder]()
        chunks = {"chunks": [k.hex() for k in keys]}
        owner = f"move {id}"

        async def step(order: str, at: str, said: Mapping[str, Any]) -> dict[str, Any]:
            sent = FleetOrderBody(instances=[at], body=dict(said), deadline=body.deadline)
            steps[order] = await self.send(order, sent, f"{id}.{order}")
            return steps[order].instances[at].get("parts", {}) if _well(steps[order]) else {}

        moved = list[str]()
        if keys and await step("prefetch", body.target, chunks):
            pinned = await step("pin", body.target, chunks | {"owner": owner, "ttl": "10 min"})
            held = [part["held"] for part in pinned.values()]
            moved = [k.hex() for i, k in enumerate(keys) if held and all(h[i] == "1" for h in held)]
            if moved and not body.copy:
                await step("clear", body.source, {"chunks": moved, "dry_run": False})
            await step("unpin", body.target, {"owner": owner})
        state = next((s.state for s in steps.values() if not _well(s)), "done")
        tokens = min(len(moved) * size, len(body.tokens) or len(moved) * size)
        return MoveAnswer(id, state, len(keys), len(moved), tokens, steps)

    async def _kept(self, body: MoveBody) -> list[bytes]:
        """Keys of what the source has of the prompt."""
        question = LookupBody(tokens=body.tokens, chunks=body.chunks, salt=body.salt)
        return await self._fleet.kept_keys(question, body.source)

    async def _one(
        self, name: str, records: list[WorkerRecord], order: str, said: Mapping[str, Any], id: str,
        deadline: str,
    ) -> dict[str, Any]:  # fmt: skip
        """The door's answer; a death is told as soon as the directory knows of it."""
        headers, limit = {"Idempotency-Key": id, "Deadline": deadline}, parse_seconds(deadline) + 5
        asked = asyncio.create_task(self._asked(records, f"/v1/{order}", said, headers, limit))
        watch = asyncio.create_task(self._until_dead(name, records))
        try:
            await asyncio.wait([asked, watch], timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                status, answer = asked.result()
                if "state" in answer:
                    return dict(answer)
                if status != 503:
                    return {"state": "failed", "detail": str(answer.get("detail", answer))}
                if not await self._lives(name, records):
                    return _lost("it has ended")
                return {"state": "failed", "detail": answer["detail"]}
            return _lost("it has ended") if watch.done() else {
                "state": "late", "detail": f"its door did not answer within {deadline}",
            }  # fmt: skip
        finally:
            asked.cancel()
            watch.cancel()

    async def _asked(
        self, records: list[WorkerRecord], path: str, said: Any, headers: Mapping[str, str],
        seconds: float,
    ) -> tuple[int, dict[str, Any]]:  # fmt: skip
        door = door_of(records)
        if not door:
            return 422, {
                "detail": "it has no door: tierloom.http in its options, or serve_http(pipe)"
            }
        try:
            status, answer = await self._call(door, path, said, seconds, **headers)
        except TierDown as error:
            return 503, {"detail": str(error)}
        return status, answer if isinstance(answer, dict) else {"detail": "no answer of a door"}

    async def _until_dead(self, name: str, records: list[WorkerRecord]) -> None:
        pause = min(2.0, _WATCH * max(r.heartbeat for r in records))
        while await self._lives(name, records):  # noqa: ASYNC110 - nobody tells of a death
            await asyncio.sleep(pause)

    async def _lives(self, name: str, records: list[WorkerRecord]) -> bool:
        """The same processes as before. A directory that does not answer says nothing of it."""
        try:
            await self._fleet.members(now=True)
            now = (await self._fleet.instances()).get(name, [])
        except TierDown:
            return True
        return {r.process for r in records} <= {r.process for r in now}


def door_of(records: list[WorkerRecord]) -> str:
    """The URL of an engine's door; empty: it has none."""
    return next((r.fields[DOOR] for r in records if r.fields.get(DOOR)), "")


def _id_of(names: list[str], key: str) -> str:
    return f"{','.join(names)}~{key}"


def _lost(detail: str) -> dict[str, Any]:
    return {"state": "lost", "detail": detail}


def _worst(told: Mapping[str, Mapping[str, Any]]) -> str:
    states = {each.get("state", "failed") for each in told.values()}
    return next((s for s in ("lost", "failed", "late", "running") if s in states), "done")


def _well(order: FleetOrder) -> bool:
    return order.state == "done"


def _checked(deadline: str) -> None:
    try:
        seconds = parse_seconds(deadline)
    except ValueError as error:
        raise InputError(f"deadline: {error}") from None
    if not 0 < seconds <= LONGEST:
        raise InputError(f"deadline {deadline!r}: {LONGEST:g} s at most")
