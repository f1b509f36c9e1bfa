"""Which Redis server has what: one server, or the master that sentinels name; for a cluster see
`cluster.py`.

A node of a cluster that fails is avoided for a second at a time while the others go on; for a
single server the tier's breaker does that. After a failure the topology is asked for again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from tierloom.stages.errors import ConfigError, TierDown
from tierloom.stages.tiers.contract.concurrently import map_concurrently
from tierloom.stages.tiers.net.address import Address
from tierloom.stages.tiers.net.connection_pool import ConnectionPool
from tierloom.stages.tiers.redis.connection import (
    AuthError,
    Credentials,
    RespConnection,
    connect_redis,
)
from tierloom.stages.tiers.redis.resp import ErrorReply, Reply, command
from tierloom.stages.tiers.redis.url import Url

LogIn = Callable[[], Credentials]

log = logging.getLogger(__name__)

REST = 1.0  # seconds for which a failing node of a cluster is avoided
_BATCH = 256  # small commands sent at once
_QUICK = 4  # connections for small commands, which must not wait behind payloads


class Moved(TierDown):
    """The cluster has moved a key to another node."""


class MayNotWrite(TierDown):
    """The server works, and lets nobody or not this user write."""


_NO_WRITES = {
    "READONLY": "it is a replica, which takes no writes",
    "NOPERM": "the user needs GET, SET, EVAL and SCAN on our keys",
    "MISCONF": "it cannot save its data to disk, so it takes no writes; its log says why",
    "NOREPLICAS": "it has fewer replicas than it needs to take writes",
}


def reply_error(reply: ErrorReply) -> TierDown:
    """What a refused command means for its server."""
    if reply.code in ("MOVED", "ASK", "TRYAGAIN"):
        return Moved(f"redis: {reply.code}; the url of a cluster begins with redis-cluster://")
    if reply.code in _NO_WRITES:
        return MayNotWrite(f"redis: {reply.code}; {_NO_WRITES[reply.code]}")
    return TierDown(f"redis refused a command: {reply.code}")


class RedisNode:
    """One server: its connections, and whether it answers."""

    def __init__(self, make: Callable[[], Awaitable[RespConnection]], connections: int) -> None:
        self._make = make
        self._connections: set[RespConnection] = set()
        self.quick = ConnectionPool(self._connect, _QUICK)
        self.bulk = ConnectionPool(self._connect, connections)
        self.error: Exception | None = None
        """Why its last call failed, if it did."""
        self.retry = 0.0

    def failed(self, error: Exception) -> None:
        self.error, self.retry = error, time.monotonic() + REST
        self.quick.forget()
        self.bulk.forget()

    async def ask(self, commands: list[bytes], *, limit: int = 64 << 10) -> list[Reply]:
        """Replies to small commands, which wait for no payload. What is refused raises, but for a
        key that does not hold a string."""
        replies: list[Reply] = []
        if commands:
            async with self.quick.connection() as connection:
                for at in range(0, len(commands), _BATCH):
                    some = commands[at : at + _BATCH]
                    replies += await connection.call(some, limit=max(limit, 256 * len(some)))
        for reply in replies:
            if isinstance(reply, ErrorReply) and reply.code != "WRONGTYPE":
                raise reply_error(reply)
        return replies

    async def close(self) -> None:
        """Close everything, and wait until the sockets are closed."""
        self.quick.close()
        self.bulk.close()
        for connection in self._connections:
            connection.abort(TierDown("the tier is closed"))
        for connection in list(self._connections):
            await connection.gone

    async def _connect(self) -> RespConnection:
        self._connections = {c for c in self._connections if not c.gone.done()}
        connection = await self._make()
        self._connections.add(connection)
        return connection


class Servers:
    """One server."""

    moves = False
    """Keys may move from node to node: that is not a failure of a node."""

    def __init__(self, url: Url, enter: LogIn, stall: float, connections: int) -> None:
        """`enter` says how to log in, and may raise ConfigError. `connections`: connections to each
        server for payloads. To be made on the loop."""
        self._hosts, self._enter, self._stall, self._limit = url.hosts, enter, stall, connections
        self.nodes = [RedisNode(self._make, connections)]
        self._opened = False

    async def open(self) -> None:
        """Raises ConfigError (authentication failed), TierDown or OSError (the server is down)."""
        try:
            async with self.nodes[0].quick.connection():
                pass
        except AuthError as error:
            raise ConfigError(str(error)) from error
        self._opened = True

    async def close(self) -> None:
        for node in self.nodes:
            await node.close()

    def node_of(self, key: bytes) -> RedisNode | None:
        """The node that has a chunk's key; None if no node has its slot."""
        return self.nodes[0]

    async def each(
        self, keys: Sequence[bytes], work: Callable[[RedisNode, list[int]], Awaitable[None]]
    ) -> list[int]:
        """`work(node, which)` with each node that has some of the keys, all at once.

        Returns which keys no node could be asked for. Raises what the nodes did when none works.
        """
        await self._look_around()
        groups: dict[RedisNode | None, list[int]] = {}
        for i, key in enumerate(keys):
            groups.setdefault(self.node_of(key), []).append(i)
        failed = groups.pop(None, [])
        refusals: list[MayNotWrite] = []

        async def go(group: tuple[RedisNode, list[int]]) -> None:
            node, which = group
            if not self._may_try(node):
                failed.extend(which)
                return
            try:
                await work(node, which)
                node.error = None
            except MayNotWrite as error:  # it may be read
                failed.extend(which)
                refusals.append(error)
                self._lost(node)
            except (OSError, TierDown) as error:
                failed.extend(which)
                if not self.moves or not isinstance(error, Moved):
                    node.failed(error)
                self._lost(node)

        pairs = [(node, which) for node, which in groups.items() if node is not None]
        await map_concurrently(go, pairs, len(pairs))
        errors = [node.error for node in self.nodes if node.error is not None]
        if failed and len(errors) == len(self.nodes):
            raise errors[0]
        if refusals and len(failed) == len(keys):
            raise refusals[0]
        return failed

    def _may_try(self, node: RedisNode) -> bool:
        return True

    def _lost(self, node: RedisNode) -> None:
        """It failed: what is known of the topology may be wrong."""

    async def _look_around(self) -> None:
        """Ask for the topology again, if it may have changed."""

    async def _make(self) -> RespConnection:
        return await self._connect(self._hosts[0])

    async def _ask(
        self, address: Address, *words: str, limit: int = 16 << 10, sentinel: bool = False
    ) -> Reply:
        """The reply to one command, on a connection of its own."""
        connection = await self._connect(address, sentinel=sentinel)
        try:
            return (await connection.call([command(*words)], limit=limit))[0]
        finally:
            connection.abort(TierDown("asked"))

    async def _connect(self, address: Address, *, sentinel: bool = False) -> RespConnection:
        try:
            entry = self._enter()
        except ConfigError as error:
            if self._opened:  # the file was there once
                raise TierDown(str(error)) from error
            raise
        if sentinel:
            try:
                return await connect_redis(address, Credentials("", "", 0, entry.tls), self._stall)
            except AuthError:
                entry = entry._replace(db=0)
        try:
            return await connect_redis(address, entry, self._stall)
        except OSError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error) and not self._opened:
                raise ConfigError(
                    f"redis at {address}: its certificate is not trusted ({error}); give `ca_file`"
                ) from error
            raise


class Sentinel(Servers):
    """The master of a service, as sentinels name it; it may change at any time."""

    def __init__(self, url: Url, enter: LogIn, stall: float, connections: int) -> None:
        super().__init__(url, enter, stall, connections)
        self._sentinels, self._service = deque(url.hosts), url.service
        self._master: Address | None = None

    def _lost(self, node: RedisNode) -> None:
        self._master = None

    async def _make(self) -> RespConnection:
        if self._master is None:
            self._master = await self._find()
        master = self._master
        connection = await self._connect(master)
        try:
            role = (await connection.call([command("ROLE")]))[0]
        except BaseException:
            connection.abort(TierDown("its role is not known"))
            raise
        # A user without the right to ask finds out by the first put.
        if not isinstance(role, ErrorReply) and not (
            isinstance(role, list) and role[:1] == [b"master"]
        ):
            self._master = None
            connection.abort(TierDown("a replica"))
            raise TierDown(f"redis at {master} is no longer the master of {self._service}")
        return connection

    async def _find(self) -> Address:
        ask = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)
        why = ""
        for _ in range(len(self._sentinels)):
            address = self._sentinels[0]
            self._sentinels.rotate(-1)  # one that hangs is asked last the next time
            try:
                answer = await self._ask(address, *ask, sentinel=True)
            except AuthError:
                raise
            except (OSError, TierDown) as error:
                why = str(error)
                continue
            if isinstance(answer, list) and len(answer) == 2:
                host, port = answer
                if isinstance(host, bytes) and isinstance(port, bytes) and port.isdigit():
                    self._sentinels.rotate(1)
                    return Address(host.decode("utf-8", "replace"), int(port))
            why = f"the sentinel at {address} knows no service {self._service!r}"
        raise TierDown(f"no sentinel knows a master of {self._service!r}: {why}")
