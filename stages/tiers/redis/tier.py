"""redis: objects in a Redis or Valkey server, a master that sentinels name, or a cluster.

    cold: {use: redis, url: "redis://127.0.0.1:6379/0", ttl: 24 h, timeout: 500 ms}
    cold: {use: redis, url: "rediss://kv@cache:6380", password_env: KV_PASSWORD, ca_file: ca.pem}
    cold: {use: redis, url: "redis-sentinel://h1,h2,h3/mymaster"}
    cold: {use: redis, url: "redis-cluster://h1:7000,h2:7000"}

There is no local index: the server is asked which objects exist, for a whole prompt in one round
trip. How objects lie there is told in `manifest.py`. The server evicts as it was set up to
(`maxmemory-policy allkeys-lru` is meant for it); an object of which it evicted anything is a miss.
Needs no client library. Payloads land in the arena, and a connection whose call was cancelled is
closed before its memory is anybody else's (`connection.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import anyio

from tierloom.stages.errors import Damaged, Lost, Refused, TierDown
from tierloom.stages.kv.object import Object
from tierloom.stages.options import Seconds, Size
from tierloom.stages.tiers.contract.concurrently import map_concurrently
from tierloom.stages.tiers.contract.tier import Read, SharedTier, TierContext, require_sealed
from tierloom.stages.tiers.net.tls import client_context
from tierloom.stages.tiers.redis.cluster import Cluster
from tierloom.stages.tiers.redis.connection import Credentials, RespConnection
from tierloom.stages.tiers.redis.manifest import LARGEST, MANIFEST, dropping
from tierloom.stages.tiers.redis.reads import PendingRead, fetch_pieces
from tierloom.stages.tiers.redis.resp import Reply, command
from tierloom.stages.tiers.redis.topology import MayNotWrite, RedisNode, Sentinel, Servers
from tierloom.stages.tiers.redis.url import parse_url, password_of
from tierloom.stages.tiers.redis.writes import Written, write

_ABSENT = -2  # what PTTL says of a key that is not there
_TOPOLOGIES = {"single": Servers, "sentinel": Sentinel, "cluster": Cluster}


@dataclass(frozen=True, kw_only=True, slots=True)
class RedisOptions:
    """Options of a Redis tier."""

    url: str = field(repr=False)
    """`redis://`, `rediss://` (TLS), `unix://`, `redis-sentinel://h1,h2/service` or
    `redis-cluster://h1,h2`, with `user:password@`, port and `/db` where needed."""
    ttl: Seconds = 86400.0
    """How long an object lives after it was stored or read (at least half of it); 0: until it is
    evicted."""
    password_env: str = ""
    """Environment variable with the password, if the url has none."""
    password_file: str = ""
    """File with the password; read at each connect, so it may change."""
    ca_file: str = ""
    """PEM file of the certificate authorities to trust. Default: the system's."""
    cert_file: str = ""
    """PEM file of the client certificate, for servers that require one."""
    key_file: str = ""
    """PEM file of its key, if `cert_file` does not contain it."""
    prefix: str = "tierloom"
    """Prefix of every key."""
    connections: int = 2
    """Most connections to each server for payloads."""
    window: int = 1
    """Pieces requested at once on each of them. The server buffers what it has not sent, so more
    costs CPU time on both sides; it helps if a round trip takes longer than a piece."""
    piece: Size = 1020 << 10
    """Bytes of a piece, for objects stored from now on. A little below a power of two: Redis'
    allocator uses 1.25 MiB for a value of 1 MiB and its header."""
    stall: Seconds = 1.0
    """A connection without any traffic for this long is closed; a cluster then avoids its node for
    a second. Must be shorter than `timeout`."""

    def __post_init__(self) -> None:
        url = parse_url(self.url)
        if self.password_env and self.password_file:
            raise ValueError("give either password_env or password_file, not both")
        if (self.password_env or self.password_file) and url.password:
            raise ValueError("give the password either in the url or in an option, not both")
        if (self.ca_file or self.cert_file) and not url.tls:
            raise ValueError("ca_file and cert_file need TLS: rediss://")
        if self.key_file and not self.cert_file:
            raise ValueError("key_file needs cert_file")
        if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", self.prefix):
            raise ValueError("prefix may contain letters, digits and _.:- only")
        if not 1 <= self.connections <= 64 or not 1 <= self.window <= 64:
            raise ValueError("connections and window must be between 1 and 64")
        if not 64 << 10 <= self.piece <= 64 << 20:
            raise ValueError("piece must be between 64 KiB and 64 MiB")
        if self.stall <= 0 or self.ttl < 0:
            raise ValueError("stall must be greater than 0, and ttl not negative")


def servers_of(options: RedisOptions) -> Servers:
    """The servers that options name, not opened; to be made on the loop. Raises ConfigError."""
    url, o = parse_url(options.url), options
    tls = client_context(o.ca_file, o.cert_file, o.key_file) if url.tls else None

    def enter() -> Credentials:
        password = password_of(url, o.password_env, o.password_file)
        return Credentials(url.user, password, url.db, tls)

    return _TOPOLOGIES[url.kind](url, enter, o.stall, o.connections)


class Redis(SharedTier):
    """Whole chunks only: inner links are found in local tiers. For asyncio only."""

    Options = RedisOptions

    def __init__(self, options: RedisOptions, ctx: TierContext) -> None:
        super().__init__(ctx)
        self.options = options
        self._url = parse_url(options.url)
        self._space = f"{options.prefix}:{ctx.namespace.hex()[:32] or 'any'}:".encode()
        self._ttl = round(options.ttl * 1000)
        self._servers: Servers | None = None

    async def open(self) -> None:
        if self._servers is None:
            self._servers = servers_of(self.options)
        await self._servers.open()

    async def close(self) -> None:
        if self._servers is not None:
            await self._servers.close()

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        found = [False] * len(keys)

        async def ask(node: RedisNode, which: list[int]) -> None:
            asked = [command("EXISTS", self._name(keys[i])) for i in which]
            for i, there in zip(which, await node.ask(asked), strict=True):
                found[i] = there == 1

        await self._up.each(keys, ask)
        return found

    async def read(self, reads: Sequence[Read]) -> None:
        loads = [PendingRead(read, self.ctx, self.counts) for read in reads]
        try:
            failed = await self._up.each(
                [read.key for read in reads],
                lambda node, which: self._read(node, [loads[i] for i in which]),
            )
            for i in failed:
                loads[i].server_failed()
            for load in loads:
                load.finish()
        finally:
            for load in loads:
                load.close()

    async def put(self, objects: Sequence[Object]) -> list[Lost | None]:
        """Raises Refused where one server takes nothing; those of a cluster are asked each time."""
        require_sealed(*objects)
        outcome: list[Lost | Written] = [Lost.TIER_DOWN] * len(objects)
        try:
            await self._up.each(
                [obj.header.key for obj in objects], partial(self._put, objects, outcome)
            )
        except MayNotWrite as error:
            if self._url.kind != "single":  # another may be the master by now
                raise
            raise Refused(str(error)) from None
        if outcome and not self._up.moves and all(each is Written.FULL for each in outcome):
            raise Refused(
                "redis: OOM; its maxmemory is used up and nothing is evicted", Lost.NO_ROOM
            )
        return [_lost(each) for each in outcome]

    async def delete(self, keys: Sequence[bytes]) -> int:
        dropped = 0

        async def forget(node: RedisNode, which: list[int]) -> None:
            nonlocal dropped
            dropped += await self._drop(node, [keys[i] for i in which])

        await self._up.each(keys, forget)
        return dropped

    async def clear(self) -> int:
        """Scans all keys of the server, so on a large one it may time out."""
        cleared = 0
        for node in list(self._up.nodes):
            cursor = 0
            while True:
                scan = command("SCAN", cursor, "MATCH", self._space + b"*", "COUNT", 1000)
                match (await node.ask([scan], limit=8 << 20))[0]:
                    case [bytes(text), list(names)] if text.isdigit():
                        cursor = int(text)
                    case _:
                        raise TierDown("redis: unexpected reply to SCAN")
                mine = [n for n in names if isinstance(n, bytes) and n.startswith(self._space)]
                gone = await node.ask([command("UNLINK", name) for name in mine])
                cleared += sum(n.endswith(b"}") and g == 1 for n, g in zip(mine, gone, strict=True))
                if not cursor:
                    break
        self._holdings.reset()
        return cleared

    @property
    def _up(self) -> Servers:
        if self._servers is None:
            raise TierDown("redis tier is not open")
        return self._servers

    def _name(self, key: bytes) -> bytes:
        return b"%b{%b}" % (self._space, key.hex().encode())

    async def _read(self, node: RedisNode, loads: list[PendingRead]) -> None:
        """The manifests in one round trip; then the pieces, those of the first frames first."""
        wanted = [load for load in loads if load.due]
        asked = [word for load in wanted for word in self._ask(load.read.key)]
        answers = iter(await node.ask(asked, limit=len(wanted) * (LARGEST + 64)))
        renew = []
        for load in wanted:
            left, raw = next(answers), next(answers)
            load.plan(self._name(load.read.key), raw if raw or left != _ABSENT else None)
            if self._ttl and isinstance(left, int) and left < self._ttl // 2:
                renew.append(load)
            await anyio.lowlevel.checkpoint()  # a header takes 50 us
        await fetch_pieces(node, loads, self.options.window)
        bad = [(load, load.proof) for load in loads if load.proof]
        again = [load.manifest.renew(self._ttl) for load in renew if load.whole and load.manifest]
        with suppress(OSError, TierDown):  # a user who may only read can still read
            if bad:
                await self._expel(node, bad)
            await node.ask(again)

    async def _expel(self, node: RedisNode, bad: list[tuple[PendingRead, Damaged]]) -> None:
        """Delete objects on proof of damage: those that were read, not what another has put there
        since."""
        await self._forget(node, [(self._name(load.read.key), load.seen) for load, _ in bad])

    def _ask(self, key: bytes) -> list[bytes]:
        """Reads no more than a manifest may have: a longer one is just a bad one."""
        name = self._name(key)
        return [command("PTTL", name), command("GETRANGE", name, 0, LARGEST)]

    async def _put(
        self,
        objects: Sequence[Object],
        outcome: list[Lost | Written],
        node: RedisNode,
        which: list[int],
    ) -> None:
        names = {i: self._name(objects[i].header.key) for i in which}
        there = await node.ask([command("EXISTS", names[i]) for i in which])
        for i, kept in zip(which, there, strict=True):
            if kept == 1:
                outcome[i] = Written.THERE
        fresh = iter([i for i in which if outcome[i] is not Written.THERE])

        async def worker(_: int) -> None:
            for i in fresh:
                async with node.bulk.connection() as connection:
                    outcome[i] = await self._write(connection, objects[i], names[i])

        count = max(1, min(node.bulk.free, len(which)))
        await map_concurrently(worker, range(count), count)

    async def _write(self, connection: RespConnection, obj: Object, name: bytes) -> Written:
        written = await write(connection, obj, name, piece=self.options.piece, ttl=self._ttl)
        if written is Written.KEPT:
            self.counts.puts += 1
            self.counts.bytes_in += obj.header.nbytes
            self._holdings.add(1, obj.header.nbytes)
        elif written is not Written.THERE:
            self.counts.refused += 1
        return written

    async def _drop(self, node: RedisNode, keys: Sequence[bytes]) -> int:
        names = [self._name(key) for key in keys]
        asked = [command("GETRANGE", name, 0, MANIFEST - 1) for name in names]
        answers = await node.ask(asked)
        return await self._forget(node, list(zip(names, answers, strict=True)))

    async def _forget(self, node: RedisNode, there: list[tuple[bytes, Reply]]) -> int:
        """Delete these names if they still begin so; how many objects there were."""
        orders = [dropping(name, raw) for name, raw in there]
        dropped = 0
        answers = await node.ask([order for order, _ in orders])
        for (_, nbytes), gone in zip(orders, answers, strict=True):
            if gone == 1:
                dropped += 1
                self._holdings.add(-1, -nbytes)
        return dropped


def _lost(outcome: Lost | Written) -> Lost | None:
    if isinstance(outcome, Lost):
        return outcome
    return None if outcome in (Written.KEPT, Written.THERE) else Lost.NO_ROOM
