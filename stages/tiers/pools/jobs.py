"""What is to be loaded of an object in a pool, and what is at hand of it."""

from __future__ import annotations

import secrets
from typing import NamedTuple

from tierloom.stages.errors import ArenaFull, BadObject, Lost
from tierloom.stages.kv.object import Object
from tierloom.stages.memory.arena import Lease
from tierloom.stages.tiers.contract.object_reader import ObjectReader
from tierloom.stages.tiers.pools.manifest import Manifest


class LoadJob(NamedTuple):
    """An object to load: parts `first` to `last` of what `manifest` says, into `lease`."""

    reader: ObjectReader
    manifest: Manifest
    lease: Lease
    first: int
    last: int

    @property
    def key(self) -> bytes:
        return self.reader.read.key


class HeaderAtHand(NamedTuple):
    """What is at hand of an object of which more is wanted."""

    page: bytes
    """Its header."""
    boundaries: tuple[int, ...]


def job_of(reader: ObjectReader, manifest: Manifest | Lost | BadObject) -> LoadJob | None:
    """What is to be loaded, with its lease; None: nothing, as the reader was told."""
    held = reader.held
    if not isinstance(manifest, Manifest):
        reader.fail(manifest)
        return None
    if held is not None and manifest.boundaries != held.header.boundaries:
        reader.miss()  # another has taken its place, perhaps a longer one
        return None
    first = held.loaded + 1 if held is not None else 0
    last = max(first, min(reader.read.upto, len(manifest.boundaries) - 1) + 1)
    try:
        return LoadJob(reader, manifest, reader.lease(manifest.boundaries[-1]), first, last)
    except ArenaFull:
        reader.miss(Lost.NO_ROOM)
        return None


def header_at_hand(obj: Object | None) -> HeaderAtHand | None:
    if obj is None:
        return None
    return HeaderAtHand(bytes(obj.lease.view[: obj.header.header_bytes]), obj.header.boundaries)


def manifest_of(raw: bytes | None) -> Manifest | Lost | BadObject:
    try:
        return Lost.ABSENT if raw is None else Manifest.unpack(raw)
    except BadObject as error:
        return error


def manifest_for(obj: Object) -> Manifest:
    return Manifest(secrets.token_bytes(8), obj.header.boundaries)
