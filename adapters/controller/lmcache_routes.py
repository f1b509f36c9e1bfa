"""The routes of LMCache's controller (0.5), for those who ask by them already: `--lmcache-routes`.

Its bodies and its answers, over what this controller does. `LocalCPUBackend` is an engine's first
tier that is announced, `LocalDiskBackend` the second. What LMCache answers later, these do at once,
so `/check_finish` says what became of it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tierloom.adapters.controller.control_bodies import LookupBody
from tierloom.adapters.controller.fleet_orders import FleetOrder, FleetOrderBody, MoveBody
from tierloom.adapters.controller.fleet_view import require_instance
from tierloom.stages.directory.shared.records import WorkerRecord

if TYPE_CHECKING:
    from tierloom.adapters.controller.control_routes import ControlRoutes

LOCATIONS = ("LocalCPUBackend", "LocalDiskBackend")
_PIN = "24 h"
"""LMCache's pins have no end, and its controller no way to end one: ours end after a day."""
_OWNER = "lmcache"
Answer = dict[str, Any]


@dataclass(frozen=True, slots=True)
class QueryInstanceRequest:
    """Who has this address."""

    ip: str
    event_id: str = ""


@dataclass(frozen=True, slots=True)
class LookupRequest:
    """Who has this prompt."""

    tokens: list[int]
    event_id: str = ""


@dataclass(frozen=True, slots=True)
class InstanceRequest:
    """An engine, and what of it."""

    instance_id: str
    location: str = ""
    tokens: list[int] = field(default_factory=list)
    method: str = ""
    worker_ids: list[int] = field(default_factory=list)
    event_id: str = ""


@dataclass(frozen=True, slots=True)
class MoveRequest:
    """From one engine and location to another."""

    old_position: tuple[str, str]
    new_position: tuple[str, str]
    tokens: list[int]
    should_copy: bool = False
    event_id: str = ""


@dataclass(frozen=True, slots=True)
class EventRequest:
    """What became of this."""

    event_id: str


class LMCacheRoutes:
    """Beside the controller's own, on its loop."""

    def __init__(self, control: ControlRoutes) -> None:
        self._control, self._fleet, self._orders = control, control.fleet, control.orders
        for answer in (
            self.query_instance, self.lookup, self.clear, self.pin, self.compress, self.decompress,
            self.move, self.health, self.check_finish, self.query_worker_info,
        ):  # fmt: skip
            control.app.post(f"/{answer.__name__}", name=f"lmcache {answer.__name__}")(answer)

    async def query_instance(self, body: QueryInstanceRequest) -> Answer:
        """The engine that is reached at an address; null: none."""
        known = await self._fleet.instances()
        found = (name for name, some in known.items() if body.ip in _hosts(some))
        return {"event_id": _event(body.event_id), "res": next(found, None)}

    async def lookup(self, body: LookupRequest) -> Answer:
        """Each engine's location and tokens, most first."""
        known, layout = await self._fleet.instances(), dict[str, list[Any]]()
        if body.tokens:
            found = await self._fleet.lookup(LookupBody(tokens=body.tokens))
            for name, hit in found.instances.items():
                best = max(hit.tiers, key=lambda tier: hit.tiers[tier], default="")
                layout[name] = [_location(known.get(name, []), best), hit.tokens]
        return {"event_id": _event(body.event_id), "layout_info": layout}

    async def clear(self, body: InstanceRequest) -> Answer:
        """All of an engine, or of one location of it; in chunks of whole size."""
        said = {"everything": True, "dry_run": False, "tiers": await self._tiers(body)}
        order = await self._send("clear", body.instance_id, said)
        chunk = (await self._fleet.instances())[body.instance_id][0].chunk
        return {"event_id": order.id, "num_tokens": chunk * _least(order, "objects")}

    async def pin(self, body: InstanceRequest) -> Answer:
        """For a day, or until `/v1/unpin` by `lmcache`."""
        said = {"tokens": body.tokens, "owner": _OWNER, "ttl": _PIN}
        order = await self._send("pin", body.instance_id, said)
        return {"event_id": order.id, "num_tokens": _least(order, "tokens")}

    async def compress(self, body: InstanceRequest) -> Answer:
        """Nothing: how a tier encodes what it keeps, its engine's file says."""
        require_instance(await self._fleet.instances(), body.instance_id)
        return {"event_id": _event(body.event_id), "num_tokens": 0}

    async def decompress(self, body: InstanceRequest) -> Answer:
        """As `compress`: what is read is decoded then."""
        return await self.compress(body)

    async def move(self, body: MoveRequest) -> Answer:
        """Into the memory of the second engine."""
        said = MoveBody(
            source=body.old_position[0], target=body.new_position[0], tokens=body.tokens,
            copy=body.should_copy,
        )  # fmt: skip
        moved = await self._orders.move(said)
        event = f"{said.target}~{moved.id}.{'unpin' if moved.moved else 'prefetch'}"
        return {"event_id": event, "num_tokens": moved.tokens}

    async def health(self, body: InstanceRequest) -> Answer:
        """0 of each worker whose engine is well, else 1."""
        known = await self._fleet.instances()
        require_instance(known, body.instance_id)
        said = await self._control.health()
        well = said.instances.get(body.instance_id) in ("ready", "degraded", "alive")
        codes = dict.fromkeys(range(len(known[body.instance_id])), int(not well))
        return {"event_id": _event(body.event_id), "error_codes": codes}

    async def check_finish(self, body: EventRequest) -> Answer:
        """done, running, failed, late or lost. What only asks is done."""
        if "~" not in body.event_id:
            return {"status": "done"}
        return {"status": (await self._orders.look(body.event_id)).state}

    async def query_worker_info(self, body: InstanceRequest) -> Answer:
        """Where an engine's workers are reached; all of them, or those asked for."""
        known = await self._fleet.instances()
        require_instance(known, body.instance_id)
        infos = [
            _worker(i, record)
            for i, record in enumerate(known[body.instance_id])
            if not body.worker_ids or i in body.worker_ids
        ]
        return {"event_id": _event(body.event_id), "worker_infos": infos}

    async def _send(self, order: str, instance: str, said: Mapping[str, Any]) -> FleetOrder:
        return await self._orders.send(order, FleetOrderBody(instances=[instance], body=dict(said)))

    async def _tiers(self, body: InstanceRequest) -> list[str]:
        """Of a location; of none in particular: all."""
        known = await self._fleet.instances()
        require_instance(known, body.instance_id)
        tiers = known[body.instance_id][0].tiers
        if body.location in LOCATIONS:
            return list(tiers[LOCATIONS.index(body.location) :][:1]) or [body.location]
        return [body.location] if body.location else []


def _event(said: str) -> str:
    """As it was said, else a new one. Raises UnicodeError for what cannot be answered."""
    said.encode()
    return said or secrets.token_hex(8)


def _hosts(records: list[WorkerRecord]) -> set[str | None]:
    return {urlsplit(url).hostname for r in records for url in (*r.addresses, *_doors(r))}


def _doors(record: WorkerRecord) -> list[str]:
    return [record.fields["door"]] if "door" in record.fields else []


def _location(records: list[WorkerRecord], tier: str) -> str:
    tiers = records[0].tiers if records else ()
    at = tiers.index(tier) if tier in tiers else len(LOCATIONS)
    return LOCATIONS[at] if at < len(LOCATIONS) else tier


def _least(order: FleetOrder, what: str) -> int:
    """Of all workers: what each of them has done."""
    parts = [part for told in order.instances.values() for part in told.get("parts", {}).values()]
    return min((int(part.get(what, 0)) for part in parts), default=0)


def _worker(number: int, record: WorkerRecord) -> Answer:
    address = record.addresses[0] if record.addresses else ""
    at = urlsplit(address)
    return {
        "instance_id": record.instance, "worker_id": number, "ip": at.hostname or "",
        "port": at.port or 0, "peer_init_url": address,
    }  # fmt: skip
