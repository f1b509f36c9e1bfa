"""Why a lookup found nothing: what of the question fits which engine, and what does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tierloom.adapters.controller.control_bodies import Explanation, InstanceHit, LookupBody
from tierloom.adapters.controller.fleet_view import FleetView
from tierloom.stages.directory.shared.described import seed_of
from tierloom.stages.directory.shared.records import WorkerRecord


async def explain_lookup(
    fleet: FleetView, body: LookupBody | None, wanted: Mapping[str, str], instance: str
) -> Explanation:
    """`body`: the prompt, where there is one. `wanted`: model, weights, dtype and chunk, as the
    asker believes them to be; empty: anything. `instance`: this engine alone. Raises InputError,
    TierDown."""
    await fleet.members(now=True)
    known = await fleet.instances()
    reasons: dict[str, list[str]] = {"": []}
    if not known:
        reasons[""].append(
            "no heartbeat: no engine tells this directory what it has; set serve.directory in "
            "their files to it"
        )
    elif instance and instance not in known:
        reasons[""].append(
            f"no heartbeat of {instance}: it has ended, or tells another directory; those that "
            f"live: {', '.join(list(known)[:20])}"
        )
    chosen = {name: some for name, some in known.items() if instance in ("", name)}
    found: dict[str, int] = {}
    if body is not None:
        found = {n: hit.tokens for n, hit in (await _hits(fleet, body)).items() if n in chosen}
    for name, records in chosen.items():
        told = [why for record in records for why in _differences(record, wanted)]
        if body is not None and name not in found and not told:
            told = await _why_absent(fleet, body, name, records[0])
        reasons[name] = list(dict.fromkeys(told))
    return Explanation(found, {name: told for name, told in reasons.items() if told})


async def _hits(fleet: FleetView, body: LookupBody) -> dict[str, InstanceHit]:
    return (await fleet.lookup(body)).instances


def _differences(record: WorkerRecord, wanted: Mapping[str, str]) -> list[str]:
    has = {
        "model": record.model, "weights": record.fields.get("weights", ""),
        "dtype": record.fields.get("dtype", ""), "chunk": str(record.chunk),
    }  # fmt: skip
    told = [
        f"other {name}: it has {has[name]!r}, asked for was {said!r}"
        for name, said in wanted.items() if said and has[name] and said != has[name]
    ]  # fmt: skip
    if not record.fields.get("token_bytes"):
        told.append("it does not say how it names chunks: it runs an older release")
    return told


async def _why_absent(
    fleet: FleetView, body: LookupBody, name: str, record: WorkerRecord
) -> list[str]:
    """Of an engine that could have it."""
    if body.salt and name in await _hits(fleet, replace(body, salt="")):
        return ["other salt: it has this prompt without one"]
    tags = {"tags": body.tags, "adapter": body.adapter}
    if any(tags.values()) and name in await _hits(fleet, replace(body, tags={}, adapter="")):
        return ["other tags or adapter: it has this prompt without them"]
    if seed_of(record, tags={}) is None:
        return ["what it says of its namespace is not understood: use one release everywhere"]
    tokens = fleet.tokens_of(body)
    if tokens and len(tokens) < record.chunk:
        short = f"the prompt has {len(tokens)} tokens, a chunk {record.chunk}: it is found where "
        return [short + "exactly this prompt was stored, to its end"]
    reason = "nobody stored a prompt that begins so, under this salt, or it was evicted"
    return [reason if not body.salt else f"{reason}; perhaps under another salt"]
