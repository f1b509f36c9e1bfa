"""The servers of a directory: which has what, and how scripts are run there, in bounded time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

from tierloom.stages.directory.shared.contract import answered_within
from tierloom.stages.directory.shared.records import NAME
from tierloom.stages.directory.shared.scripts import Script
from tierloom.stages.errors import TierDown
from tierloom.stages.tiers.redis.resp import ErrorReply, Reply
from tierloom.stages.tiers.redis.tier import RedisOptions, servers_of
from tierloom.stages.tiers.redis.topology import RedisNode, Servers, reply_error
from tierloom.stages.tiers.redis.url import parse_url

FIRST = bytes(2)
"""The place of what there is once."""
SMALL = 64 << 10
LARGE = 16 << 20
"""Most bytes of an answer, with all workers."""
_CURES = {
    "READONLY": "this server is a replica: give the master, or redis-sentinel://",
    "ERR": "it must be Redis 7 or newer, or Valkey; in a cluster slots may have moved",
    "OOM": "it is full: raise maxmemory, or set maxmemory-policy allkeys-lru",
}
Asked = tuple[Script, bytes, tuple[bytes | int, ...]]


class DirectoryNodes:
    """One server, the master that sentinels name, or the nodes of a cluster. For asyncio only."""

    def __init__(self, options: RedisOptions, limit: float) -> None:
        """`limit`: seconds that anything may take."""
        self._options, self._limit = options, limit
        self.prefix = options.prefix.encode()
        self.cluster = parse_url(options.url).kind == "cluster"
        self.key_bytes = len(self.prefix) + 6 * self.cluster + NAME
        """Of a chunk's key."""
        self._servers: Servers | None = None
        self._opened = False
        self._homes: dict[RedisNode, bytes] = {}
        self._homes_of: list[RedisNode] | None = None

    async def _open(self) -> None:
        """Connect, unless that is done."""
        if not self._opened:
            if self._servers is None:
                self._servers = servers_of(self._options)
            with self.in_time():
                await self._servers.open()
            self._opened = True

    async def close(self) -> None:
        if self._servers is not None:
            await self._servers.close()

    @property
    def servers(self) -> Servers:
        if self._servers is None:
            raise TierDown("the directory is not open")
        return self._servers

    @contextmanager
    def in_time(self) -> Iterator[None]:
        with answered_within(self._limit):
            yield

    def place(self, name: bytes) -> bytes:
        """Where a chunk lies. Its name decides that alone: what a worker tells of a chunk, and has
        after a restart, says nothing of the chain that it is in."""
        return name[: len(FIRST)] if self.cluster else FIRST

    def chunks_at(self, place: bytes) -> bytes:
        """The prefix of chunks' keys."""
        return self.prefix + b"{%b}" % place.hex().encode() if self.cluster else self.prefix

    def home(self, place: bytes) -> bytes:
        return self.chunks_at(place) + b"!"

    def home_of(self, node: RedisNode) -> bytes:
        """The prefix of what a node has to itself: by the least place that lies on it, so that all
        who know the same topology come to the same."""
        if self._homes_of is not self.servers.nodes:
            homes: dict[RedisNode, bytes] = {}
            for n in range(1 << 16):
                place = n.to_bytes(2, "big")
                there = self.servers.node_of(place)
                if there is not None:
                    homes.setdefault(there, self.home(place))
                if len(homes) == len(self.servers.nodes):
                    break
            self._homes, self._homes_of = homes, self.servers.nodes
        if node not in self._homes:
            raise TierDown("redis: a node that has none of the places")
        return self._homes[node]

    async def each(
        self, places: Sequence[bytes], work: Callable[[RedisNode, list[int]], Awaitable[None]]
    ) -> list[int]:
        """`work` with each node that has some of the places, all at once; which were not reached.
        Raises TierDown where no node works."""
        await self._open()
        with self.in_time():
            return await self.servers.each(places, work)

    async def everywhere(self, work: Callable[[RedisNode, bytes], Awaitable[None]]) -> None:
        """`work` with each node and its home. Raises TierDown where no node works."""
        await self._open()
        homes = [self.home_of(node) for node in self.servers.nodes]
        places = [bytes.fromhex(h[-6:-2].decode()) if self.cluster else FIRST for h in homes]

        async def go(node: RedisNode, _: list[int]) -> None:
            await work(node, self.home_of(node))

        await self.each(places, go)

    async def first(self, work: Callable[[RedisNode, bytes], Awaitable[None]]) -> None:
        """`work` with the node that has what there is once, and its home. Raises TierDown."""

        async def go(node: RedisNode, _: list[int]) -> None:
            await work(node, self.home(FIRST))

        if await self.each([FIRST], go):
            raise TierDown("redis: the node that has the directory's workers does not answer")

    async def ask_first(self, script: Script, *arguments: bytes | int, limit: int = SMALL) -> Reply:
        """What that node says to a script."""
        replies: list[Reply] = []

        async def ask(node: RedisNode, home: bytes) -> None:
            replies.extend(await self.run(node, [(script, home, arguments)], limit))

        await self.first(ask)
        return replies[0]

    async def run(self, node: RedisNode, asked: Sequence[Asked], limit: int = SMALL) -> list[Reply]:
        """Replies to scripts, sent whole only where the server does not know them yet."""
        async with node.quick.connection() as connection:
            sent = [script.by_hash(key, *arguments) for script, key, arguments in asked]
            replies = await connection.call(sent, limit=limit)
            new = [i for i, r in enumerate(replies) if getattr(r, "code", "") == "NOSCRIPT"]
            sent = [asked[i][0].whole(asked[i][1], *asked[i][2]) for i in new]
            again = await connection.call(sent, limit=limit)
        for i, reply in zip(new, again, strict=True):
            replies[i] = reply
        for reply in replies:
            if isinstance(reply, ErrorReply):
                cure = _CURES.get(reply.code)
                raise TierDown(f"redis says {reply.code}: {cure}") if cure else reply_error(reply)
        return replies
