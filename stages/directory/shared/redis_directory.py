"""redis: the directory in a Redis or Valkey server, a master that sentinels name, or a cluster.

    RedisDirectory(RedisOptions(url="redis-sentinel://h1,h2,h3/mymaster", password_env="PW"))

Addresses, TLS and secrets are those of the tier `redis`, and so are its connections. What is asked
of the server is in `scripts.py`: a prefix of 64 chunks is one round trip; in a cluster one to each
node that may have some of them, all at once. Holders whose heartbeat is gone are left out by the
script. What time it is, the server decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from tierloom.stages.directory.shared import scripts
from tierloom.stages.directory.shared.contract import Directory, Member, name_taken
from tierloom.stages.directory.shared.nodes import FIRST, LARGE, DirectoryNodes
from tierloom.stages.directory.shared.records import (
    CHANGE,
    ChunkHolder,
    WorkerRecord,
    epoch_of,
    holders_in,
    number_of,
    require_changes,
    require_names,
    turn_of,
    word_of,
)
from tierloom.stages.errors import InputError, TierDown
from tierloom.stages.tiers.redis.resp import Reply
from tierloom.stages.tiers.redis.tier import RedisOptions
from tierloom.stages.tiers.redis.topology import RedisNode

_SWEEP_EVERY = 1000  # ms between two sweeps, whoever makes them


class RedisDirectory(Directory):
    """For asyncio only."""

    def __init__(self, options: RedisOptions, *, timeout: float = 1.0) -> None:
        """`timeout`: seconds after which a call raises TierDown."""
        self._nodes = DirectoryNodes(options, timeout)
        self._lives: dict[int, int] = {}  # who joined here: milliseconds that its beat lasts

    async def close(self) -> None:
        await self._nodes.close()

    async def join(self, worker: WorkerRecord, *, first: int = 0, last: int = 0) -> int:
        life, name = round(2000 * worker.heartbeat), worker.name.encode()
        turns = (turn_of(first), turn_of(last))
        who = (name, worker.process.encode(), *turns, worker.pack())
        match await self._nodes.ask_first(scripts.JOIN, *who):
            case [int(turn), int(old)]:
                epoch = epoch_of(turn, worker)
            case _:
                raise TierDown("redis: unexpected reply to a worker that joins")
        if not turn:
            raise name_taken(worker)

        async def enter(node: RedisNode, home: bytes) -> None:
            await self._nodes.run(
                node, [(scripts.ENTER, home, (number_of(epoch), life, epoch, old))]
            )

        await self._nodes.everywhere(enter)
        self._lives.pop(last, None)
        self._lives[epoch] = life
        return epoch

    async def leave(self, epoch: int) -> None:
        async def leave(node: RedisNode, home: bytes) -> None:
            await self._nodes.run(node, [(scripts.LEAVE, home, (number_of(epoch), epoch))])

        self._lives.pop(epoch, None)
        await self._nodes.everywhere(leave)

    async def beat(self, epoch: int, sequence: int) -> bool:
        life, lives = self._lives.get(epoch), True
        if life is None:
            return False

        async def beat(node: RedisNode, home: bytes) -> None:
            nonlocal lives
            said = (number_of(epoch), life, epoch, sequence, int(home == self._nodes.home(FIRST)))
            (done,) = await self._nodes.run(node, [(scripts.BEAT, home, said)])
            lives = lives and done == 1

        await self._nodes.everywhere(beat)
        return lives

    async def announce(self, epoch: int, sequence: int, changes: bytes) -> bool:
        require_changes(changes)
        life, taken = self._lives.get(epoch), True
        if life is None:
            return False
        parts: dict[RedisNode | None, bytearray] = {}
        for at in range(0, len(changes) if self._nodes.cluster else 0, CHANGE):
            change = changes[at : at + CHANGE]
            node = self._nodes.servers.node_of(self._nodes.place(change))
            parts.setdefault(node, bytearray()).extend(change)

        async def tell(node: RedisNode, home: bytes) -> None:
            nonlocal taken
            mine = bytes(parts.get(node, b"")) if self._nodes.cluster else changes
            said = (
                number_of(epoch), life, epoch, sequence, self._nodes.prefix,
                int(self._nodes.cluster), mine,
            )  # fmt: skip
            (done,) = await self._nodes.run(node, [(scripts.ANNOUNCE, home, said)])
            taken = taken and done == 1

        await self._nodes.everywhere(tell)
        return taken

    async def find(self, names: Sequence[bytes]) -> list[tuple[ChunkHolder, ...]]:
        require_names(names)
        if not names:
            return []
        every = range(len(names))
        places = [self._nodes.place(name) for name in names] if self._nodes.cluster else [FIRST]
        found: list[tuple[ChunkHolder, ...]] = [()] * len(names)

        async def ask(node: RedisNode, which: list[int]) -> None:
            wanted: Sequence[int] = which if self._nodes.cluster else every
            asked = b"".join([names[i] for i in wanted])
            what = (self._nodes.prefix, int(self._nodes.cluster), asked)
            run = (scripts.FIND, self._nodes.home_of(node), what)
            (reply,) = await self._nodes.run(node, [run], 1024 + 256 * len(wanted))
            for i, holders in zip(wanted, _unfolded(reply, len(wanted)), strict=False):
                found[i] = holders

        await self._nodes.each(places, ask)
        return list(takewhile(bool, found))

    async def report(self, name: bytes, holder: ChunkHolder) -> None:
        require_names([name])
        place, word = self._nodes.place(name), word_of(*holder)
        key = self._nodes.chunks_at(place) + name

        async def report(node: RedisNode, _: list[int]) -> None:
            await self._nodes.run(node, [(scripts.REPORT, key, (word,))])

        await self._nodes.each([place], report)

    async def workers(self, numbers: Sequence[int] = ()) -> dict[int, Member]:
        reply = await self._nodes.ask_first(scripts.WORKERS, *numbers, limit=LARGE)
        found: dict[int, Member] = {}
        parts = reply if isinstance(reply, list) else []
        for number, raw in zip(parts[::2], parts[1::2], strict=False):
            if isinstance(number, bytes) and isinstance(raw, bytes):
                turn, _, said = raw.partition(b" ")
                try:
                    record = WorkerRecord.unpack(said)
                    found[int(number)] = Member(epoch_of(int(turn), record), record)
                except (InputError, ValueError):
                    continue  # a later version's, or nobody's
        return found

    async def sweep(self, most: int = 2000) -> int:
        changed = 0

        async def sweep(node: RedisNode, home: bytes) -> None:
            nonlocal changed
            what = (self._nodes.prefix, self._nodes.key_bytes, most, _SWEEP_EVERY)
            (reply,) = await self._nodes.run(node, [(scripts.SWEEP, home, what)])
            changed += reply if isinstance(reply, int) else 0

        await self._nodes.everywhere(sweep)
        return changed


def _unfolded(reply: Reply, most: int) -> list[tuple[ChunkHolder, ...]]:
    """The holders of each chunk, from what `FIND` said of at most so many. Raises TierDown."""
    found: list[tuple[ChunkHolder, ...]] = []
    parts = reply if isinstance(reply, list) else []
    for words, count in zip(parts[::2], parts[1::2], strict=False):
        if not isinstance(words, bytes) or not isinstance(count, int):
            raise TierDown("redis: unexpected reply to a search")
        if not 0 < count <= most - len(found):
            raise TierDown(f"redis: a search for {most} chunks found more")
        found += [holders_in(words)] * count
    return found
