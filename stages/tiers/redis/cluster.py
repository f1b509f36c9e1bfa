"""Which node of a Redis cluster has what: all of an object lies in one of 16,384 slots."""

from __future__ import annotations

import time
from binascii import crc_hqx
from contextlib import suppress

from tierloom.stages.errors import ConfigError, TierDown
from tierloom.stages.tiers.net.address import Address
from tierloom.stages.tiers.redis.connection import AuthError, RespConnection
from tierloom.stages.tiers.redis.resp import ErrorReply, Reply
from tierloom.stages.tiers.redis.topology import REST, LogIn, RedisNode, Servers
from tierloom.stages.tiers.redis.url import Url

SLOTS = 16384


class Cluster(Servers):
    """Nodes that share 16,384 slots."""

    moves = True

    def __init__(self, url: Url, enter: LogIn, stall: float, connections: int) -> None:
        super().__init__(url, enter, stall, connections)
        self.nodes = []
        self._by_address: dict[Address, RedisNode] = {}
        self._slots: list[RedisNode | None] = [None] * SLOTS
        self._ask_again, self._asked = True, 0.0

    async def open(self) -> None:
        try:
            await self._learn()
        except AuthError as error:
            raise ConfigError(str(error)) from error
        self._opened = True

    def node_of(self, key: bytes) -> RedisNode | None:
        return self._slots[crc_hqx(key.hex().encode(), 0) % SLOTS]

    def _may_try(self, node: RedisNode) -> bool:
        now = time.monotonic()
        if node.error is not None:
            if now < node.retry:
                return False
            node.retry = now + REST  # one call finds out; the others go on without
        return True

    def _lost(self, node: RedisNode) -> None:
        self._ask_again = True

    async def _look_around(self) -> None:
        if self._ask_again and time.monotonic() >= self._asked + REST:
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
        slots: list[RedisNode | None] = [None] * SLOTS
        used = {}
        for first, last, address in ranges:
            node = self._by_address.get(address)
            if node is None:

                async def make(address: Address = address) -> RespConnection:
                    return await self._connect(address)

                node = self._by_address[address] = RedisNode(make, self._limit)
            used[address] = node
            slots[first : last + 1] = [node] * (last + 1 - first)
        gone = [node for address, node in self._by_address.items() if address not in used]
        self._by_address, self._slots, self.nodes = used, slots, list(used.values())
        for node in gone:
            node.failed(TierDown("left the cluster"))


def _ranges(answer: Reply, host: str) -> list[tuple[int, int, Address]]:
    """The reply to CLUSTER SLOTS. `host`: stands in for an empty host name. Raises TierDown."""
    if isinstance(answer, ErrorReply):
        raise TierDown(f"redis at {host} does not report its slots: {answer.code}")
    found = []
    for entry in answer if isinstance(answer, list) else []:
        match entry:
            case [int(first), int(last), [name, int(port), *_], *_] if (
                0 <= first <= last < SLOTS and isinstance(name, bytes | None)
            ):
                where = name.decode("utf-8", "replace") if name else host
                found.append((first, last, Address(where, port)))
            case _:
                raise TierDown("redis: unexpected reply to CLUSTER SLOTS")
    if not found:
        raise TierDown("redis: the server is not a cluster, or has no slots; use redis://")
    return found
