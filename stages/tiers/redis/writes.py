"""How one object is written to Redis: its pieces, a few ahead, then the manifest, in one stream."""

from __future__ import annotations

import asyncio
import secrets
from enum import Enum, auto

from tierloom.stages.kv.object import Object
from tierloom.stages.tiers.redis.connection import RespConnection
from tierloom.stages.tiers.redis.manifest import Manifest
from tierloom.stages.tiers.redis.resp import ErrorReply, PendingReply, Reply, command
from tierloom.stages.tiers.redis.topology import reply_error

_AHEAD = 4  # pieces sent before the first of them was acknowledged


class Written(Enum):
    """What became of an object."""

    KEPT = auto()
    THERE = auto()
    """Another writer was quicker."""
    EVICTED = auto()
    """The server evicted a piece before the last one came."""
    FULL = auto()


async def write(
    connection: RespConnection, obj: Object, name: bytes, *, piece: int, ttl: int
) -> Written:
    """Keep an object under `name`, whole or not at all. `ttl`: milliseconds, 0: until it is
    evicted. Raises TierDown."""
    header, view = obj.header, obj.lease.view
    head = header.header_bytes
    manifest = Manifest(name, secrets.token_bytes(8), header.nbytes, piece, head)
    under_way: list[PendingReply] = []
    full = False
    for number, begin, stop in manifest.parts(head, header.nbytes):
        if len(under_way) == _AHEAD:
            full = full or _is_full(await under_way.pop(0).future)
        if full:
            break
        want = PendingReply(asyncio.get_running_loop().create_future(), lease=obj.lease)
        under_way.append(await connection.send(manifest.store(number, view[begin:stop]), want))
    for want in under_way:
        full = _is_full(await want.future) or full
    if not full:
        kept = (await connection.call([manifest.commit(view[:head], ttl)]))[0]
        if isinstance(kept, ErrorReply) and kept.code != "OOM":
            raise reply_error(kept)
        if kept in (1, 2):
            return Written.KEPT if kept == 1 else Written.THERE
        full = isinstance(kept, ErrorReply)
    await connection.call([command("UNLINK", each) for each in manifest.names()[1:]])
    return Written.FULL if full else Written.EVICTED


def _is_full(replies: list[Reply]) -> bool:
    """Whether the server had no room for a piece."""
    reply = replies[0]
    if isinstance(reply, ErrorReply) and reply.code != "OOM":
        raise reply_error(reply)
    return isinstance(reply, ErrorReply)
