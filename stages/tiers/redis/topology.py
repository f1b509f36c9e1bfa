"""Which Redis server has what: one server, a master that sentinels name, or a cluster's nodes.

A node of a cluster that fails is left alone for a second at a time while the others go on; of a
single server the tier's breaker does that. Where everything is, is asked again after a failure.
"""

from __future__ import annotations

import logging
import time
from binascii import crc_hqx
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from tierloom.stages.errors import ConfigError, TierDown
from tierloom.stages.tiers.contract.concurrently import map_concurrently
from tierloom.stages.tiers.net.address import Address
from tierloom.stages.tiers.net.connection_pool import ConnectionPool
from tierloom.stages.tiers.redis.connection import AuthError, Credentials, RespConnection, connect
from tierloom.stages.tiers.redis.resp import ErrorReply, Reply, command

log = logging.getLogger(__name__)

SLOTS = 16384
_REST = 1.0  # seconds for which a failing node of a cluster is left alone
_QUICK = 4  # connections for small commands, which must not wait behind payloads


class Moved(TierDown):
    """A cluster keeps a key elsewhere by now."""


class Node:
    """One server: its connections, and whether it answers."""

    def __init__(self, make: Callable[[], Awaitable[RespConnection]], connections: int) -> None:
        self._make = make
        self._connections: set[RespConnection] = set()
        self.quick = ConnectionPool(self._connect, _QUICK)
        self.bulk = ConnectionPool(self._connect, connections)
        self.error: Exception | None = None
        """Why its last call failed; None: it did not."""
        self.retry = 0.0

    def failed(self, error: Exception) -> None:
        self.error, self.retry = error, time.monotonic() + _REST
        self.quick.forget()
        self.bulk.forget()

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
    """Keys may move from node to node, and no node is to blame."""

    def __init__(
        self,
        hosts: Sequence[Address],
        enter: Callable[[], Credentials],
        *,
        stall: float,
        connections: int,
    ) -> None:
        """`enter` says how to log in, and may raise ConfigError. `connections`: connections to each
        server for payloads. To be made on the loop."""
        self._hosts, self._enter, self._stall, self._limit = hosts, enter, stall, connections
        self.nodes = [Node(self._make, connections)]
        self._opened = False

    async def open(self) -> None:
        """Raises ConfigError when we are not let in, TierDown or OSError when nobody is there."""
        try:
            async with self.nodes[0].quick.connection():
                pass
        except AuthError as error:
            raise ConfigError(str(error)) from error
        self._opened = True

    async def close(self) -> None:
        for node in self.nodes:
            await node.close()

    def node_of(self, key: bytes) -> Node | None:
        """Who has what is kept under a chunk's key; None: nobody."""
        return self.nodes[0]

    async def each(
        self, keys: Sequence[bytes], work: Callable[[Node, list[int]], Awaitable[None]]
    ) -> list[int]:
        """`work(node, which)` with each node that has some of the keys, all at once.

        Returns which keys no node could be asked for. Raises what the nodes did when none works.
        """
        await self._look_around()
        groups: dict[Node | None, list[int]] = {}
        for i, key in enumerate(keys):
            groups.setdefault(self.node_of(key), []).append(i)
        failed = groups.pop(None, [])

        async def go(group: tuple[Node, list[int]]) -> None:
            node, which = group
            if not self._may_try(node):
                failed.extend(which)
                return
            try:
                await work(node, which)
                node.error = None
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
        return failed

    def _may_try(self, node: Node) -> bool:
        return True

    def _lost(self, node: Node) -> None:
        """It failed: what we know of where things are may be wrong."""

    async def _look_around(self) -> None:
        """Ask again where things are, where that may have changed."""

    async def _make(self) -> RespConnection:
        return await self._connect(self._hosts[0])

    async def _ask(
        self, address: Address, *words: str, limit: int = 16 << 10, sentinel: bool = False
    ) -> Reply:
        """The answer to one command, on a connection for it alone."""
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
                return await connect(address, Credentials("", "", 0, entry.tls), self._stall)
            except AuthError:
                entry = entry._replace(db=0)
        try:
            return await connect(address, entry, self._stall)
        except OSError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error) and not self._opened:
                raise ConfigError(
                    f"redis at {address}: its certificate is not trusted ({error}); give `ca_file`"
                ) from error
            raise


class Sentinel(Servers):
    """The master of a service, which sentinels know; who that is may change at any time."""

    def __init__(
        self, hosts: Sequence[Address], enter: Callable[[], Credentials], service: str, *,
        stall: float, connections: int,
    ) -> None:  # fmt: skip
        super().__init__(hosts, enter, stall=stall, connections=connections)
        self._sentinels = deque(hosts)
        self._service = service
        self._master: Address | None = None

    def _lost(self, node: Node) -> None:
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
        # Who is not allowed to ask finds out by the first store.
        if not isinstance(role, ErrorReply) and not (
            isinstance(role, list) and role[:1] == [b"master"]
        ):
            self._master = None
            connection.abort(TierDown("a replica"))
            raise TierDown(f"redis at {master} is not the master of {self._service} any more")
        return connection

    async def _find(self) -> Address:
        ask = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)
        why = ""
        for _ in range(len(self._sentinels)):
            address = self._sentinels[0]
            self._sentinels.rotate(-1)  # who hangs is asked last next time
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
        raise TierDown(f"no sentinel names a master of {self._service!r}: {why}")


class Cluster(Servers):
    """Nodes that share 16,384 slots; all of an object lies in one."""

    moves = True

    def __init__(
        self,
        hosts: Sequence[Address],
        enter: Callable[[], Credentials],
        *,
        stall: float,
        connections: int,
    ) -> None:
        super().__init__(hosts, enter, stall=stall, connections=connections)
        self.nodes = []
        self._by_address: dict[Address, Node] = {}
        self._slots: list[Node | None] = [None] * SLOTS
        self._ask_again, self._asked = True, 0.0

    async def open(self) -> None:
        try:
            await self._learn()
        except AuthError as error:
            raise ConfigError(str(error)) from error
        self._opened = True

    def node_of(self, key: bytes) -> Node | None:
        return self._slots[crc_hqx(key.hex().encode(), 0) % SLOTS]

    def _may_try(self, node: Node) -> bool:
        now = time.monotonic()
        if node.error is not None:
            if now < node.retry:
                return False
            node.retry = now + _REST  # one call finds out; the others go on without
        return True

    def _lost(self, node: Node) -> None:
        self._ask_again = True

    async def _look_around(self) -> None:
        if self._ask_again and time.monotonic() >= self._asked + _REST:
            self._asked = time.monotonic()
            with suppress(OSError, TierDown):  # then what we know has to do
                await self._learn()

    async def _learn(self) -> None:
        """Ask any node which slots lie where. Raises what the last one asked did."""
        known = sorted(self._by_address, key=lambda a: self._by_address[a].error is not None)
        why: Exception = TierDown("no node of the cluster knows all slots")
        for address in dict.fromkeys([*known, *self._hosts]):
            node = self._by_address.get(address)
            if node is not None and node.error is not None and time.monotonic() < node.retry:
                continue
            try:
                answer = await self._ask(address, "CLUSTER", "SLOTS", limit=1 << 20)
                self._take(_ranges(answer, address.host))
            except (OSError, TierDown) as error:
                why = error
            else:
                self._ask_again = False
                return
        raise why

    def _take(self, ranges: list[tuple[int, int, Address]]) -> None:
        slots: list[Node | None] = [None] * SLOTS
        used = {}
        for first, last, address in ranges:
            node = self._by_address.get(address)
            if node is None:

                async def make(address: Address = address) -> RespConnection:
                    return await self._connect(address)

                node = self._by_address[address] = Node(make, self._limit)
            used[address] = node
            slots[first : last + 1] = [node] * (last + 1 - first)
        gone = [node for address, node in self._by_address.items() if address not in used]
        self._by_address, self._slots, self.nodes = used, slots, list(used.values())
        for node in gone:
            node.failed(TierDown("no longer in the cluster"))


def _ranges(answer: Reply, host: str) -> list[tuple[int, int, Address]]:
    """What CLUSTER SLOTS says. `host`: whom a node means that names none. Raises TierDown."""
    if isinstance(answer, ErrorReply):
        raise TierDown(f"redis at {host} tells no slots: {answer.code}")
    found = []
    for entry in answer if isinstance(answer, list) else []:
        match entry:
            case [int(first), int(last), [name, int(port), *_], *_] if (
                0 <= first <= last < SLOTS and isinstance(name, bytes | None)
            ):
                where = name.decode("utf-8", "replace") if name else host
                found.append((first, last, Address(where, port)))
            case _:
                raise TierDown("CLUSTER SLOTS was answered with what is no table of slots")
    if not found:
        raise TierDown("it is no cluster, or has no slots")
    return found
