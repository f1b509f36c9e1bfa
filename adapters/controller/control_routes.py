"""The paths of the controller, beside those of every door."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

from fastapi import Header, Query
from fastapi.responses import JSONResponse

from tierloom.adapters.controller.control_bodies import (
    Explanation,
    FleetHealth,
    InstanceSummary,
    LookupAnswer,
    LookupBody,
    Workers,
)
from tierloom.adapters.controller.explained import explain_lookup
from tierloom.adapters.controller.fleet_orders import (
    FleetOrder,
    FleetOrderBody,
    FleetOrders,
    MoveAnswer,
    MoveBody,
    door_of,
)
from tierloom.adapters.controller.fleet_view import FleetView, require_instance
from tierloom.adapters.door.door_client import DoorClient
from tierloom.adapters.door.readiness import Readiness
from tierloom.adapters.door.routes import DoorRoutes, Parts
from tierloom.pipeline.admin.admin_bodies import SENT
from tierloom.stages.directory.shared.records import WorkerRecord
from tierloom.stages.errors import ConfigError, InputError, TierDown

_DOORS = 32
"""Doors that are asked at once."""
Key = Annotated[str, Header(pattern="^[A-Za-z0-9._-]{0,100}$")]
_STATUS = 2.0
"""Seconds that one may take to say how its engine is."""
Doors = Callable[[str, float], DoorClient]


async def _nothing() -> Parts:
    return {}


class ControlRoutes(DoorRoutes):
    """On the loop of the controller's door."""

    def __init__(self, fleet: FleetView, doors: Doors, draining: Callable[[], str]) -> None:
        """`doors`: who asks the door at a URL, within so many seconds."""
        super().__init__(_nothing, draining, dict)
        self.fleet, self._doors = fleet, doors
        self._lookups = self._hits = 0
        self._threads = ThreadPoolExecutor(_DOORS, "tierloom-doors")
        self.app.title = "tierloom control"
        self.app.post("/v1/lookup")(self.lookup)
        self.app.get("/v1/instances")(self.instances)
        self.app.get("/v1/instances/{instance:path}/workers")(self.workers)
        self.app.get("/v1/health")(self.health)
        self.app.get("/v1/explain")(self.explain)
        self.app.post("/v1/explain")(self.explain_body)
        self.orders = FleetOrders(fleet, self.call)
        for order in SENT:
            self.app.post(f"/v1/{order}", response_model=FleetOrder)(self._sender(order))
        self.app.post("/v1/move")(self.move)
        self.app.get("/v1/orders/{id:path}")(self.order)
        self.app.exception_handler(InputError)(partial(_told, 422))
        self.app.exception_handler(ConfigError)(partial(_told, 422))
        self.app.exception_handler(TierDown)(partial(_told, 503))

    async def lookup(self, body: LookupBody) -> LookupAnswer:
        """Who has how much of a prompt, in which tiers."""
        found = await self.fleet.lookup(body)
        self._lookups += 1
        self._hits += bool(found.instances)
        return found

    async def instances(self) -> dict[str, InstanceSummary]:
        """Engines that live."""
        return {name: _summary(some) for name, some in (await self.fleet.instances()).items()}

    async def workers(self, instance: str) -> Workers:
        """The records of an engine's workers."""
        known = await self.fleet.instances()
        require_instance(known, instance)
        return {record.name: asdict(record) for record in known[instance]}

    async def health(self) -> FleetHealth:
        """What each engine's door says of itself, asked now."""
        try:
            known = await self.fleet.instances()
        except TierDown:
            return FleetHealth("unready", {})
        doors = {name: _summary(some).door for name, some in known.items()}
        said = await asyncio.gather(*(self._status(door) for door in doors.values()))
        return FleetHealth("ready", dict(zip(doors, said, strict=True)))

    async def explain(
        self, model: str = "", instance: str = "", salt: str = "", weights: str = "",
        dtype: str = "", chunk: int = 0, tokens: Annotated[str, Query(max_length=65536)] = "",
        text: str = "",
    ) -> Explanation:  # fmt: skip
        """Why a lookup finds nothing, or so little. `tokens`: ids with commas between them."""
        try:
            ids = [int(word) for word in tokens.split(",") if word.strip()]
        except ValueError:
            raise InputError("tokens: whole numbers with commas") from None
        body = LookupBody(tokens=ids, text=text, model=model, salt=salt) if ids or text else None
        wanted = {"model": model, "weights": weights, "dtype": dtype, "chunk": str(chunk or "")}
        return await explain_lookup(self.fleet, body, wanted, instance)

    async def explain_body(self, body: LookupBody) -> Explanation:
        """The same for a prompt that is too long for an address."""
        return await explain_lookup(self.fleet, body, {"model": body.model}, "")

    async def move(self, body: MoveBody, idempotency_key: Key = "") -> MoveAnswer:
        """Chunks from one engine to another."""
        return await self.orders.move(body, idempotency_key)

    async def order(self, id: str) -> FleetOrder:
        """How far an order is, or what came of it within the last hour."""
        return await self.orders.look(id)

    def _sender(self, order: str) -> Callable[..., Coroutine[Any, Any, FleetOrder]]:
        async def send(body: FleetOrderBody, idempotency_key: Key = "") -> FleetOrder:
            return await self.orders.send(order, body, idempotency_key)

        return send

    async def call(
        self, door: str, path: str, body: Any = None, seconds: float = _STATUS, **headers: str
    ) -> tuple[int, Any]:
        """Status and answer of an engine's door. Raises TierDown."""
        ask = partial(self._ask, door, path, body, seconds, headers)
        return await asyncio.get_running_loop().run_in_executor(self._threads, ask)

    def _ask(
        self, door: str, path: str, body: Any, seconds: float, headers: dict[str, str]
    ) -> tuple[int, Any]:
        try:
            return self._doors(door, seconds).call(path, body, **headers)
        except ConfigError as error:  # what a record names may be anything
            raise TierDown(str(error)) from None

    async def _status(self, door: str) -> str:
        if not door:
            return "alive"
        try:
            _, said = await self.call(door, "/readyz")
            return str(said["status"])
        except (TierDown, KeyError, TypeError):
            return "silent"

    async def _readiness(self, parts: Parts) -> Readiness:
        if reason := self._draining():
            return Readiness("unready", [reason])
        try:
            await self.fleet.members()
        except TierDown:
            return Readiness("unready", ["the directory does not answer"])
        return Readiness("ready", [])

    async def _gauges(self, parts: Parts) -> dict[str, tuple[str, float]]:
        said = await self._readiness(parts)
        known = await self.fleet.instances() if said.status == "ready" else {}
        return {
            "ready": ("1 while it is ready or degraded.", float(said.status == "ready")),
            "control_instances": ("Engines that live.", float(len(known))),
            "control_workers": ("Their workers.", float(sum(map(len, known.values())))),
            "control_lookups": ("Lookups that were answered.", float(self._lookups)),
            "control_hits": ("Of these, those that found something.", float(self._hits)),
        }


def _summary(records: list[WorkerRecord]) -> InstanceSummary:
    first = records[0]
    return InstanceSummary(
        model=first.model, workers=len(records),
        tiers=list(dict.fromkeys(tier for r in records for tier in r.tiers)),
        addresses=[address for r in records for address in r.addresses],
        door=door_of(records),
        chunk=first.chunk, grain=first.grain,
    )  # fmt: skip


async def _told(status: int, _: object, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status)
