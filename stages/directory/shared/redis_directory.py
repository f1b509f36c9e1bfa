"""redis: the directory in a Redis or Valkey server, a master that sentinels name, or a cluster.

    RedisDirectory(RedisOptions(url="redis-sentinel://h1,h2,h3/mymaster", password_env="PW"))

Addresses, TLS and secrets are those of the tier `redis`, and so are its connections. What is asked
of the server is in `scripts.py`: a prefix of 64 chunks is one round trip; in a cluster one to each
node that has some of its groups, all at once. Holders whose heartbeat is gone are left out by the
script. What time it is, the server decides.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import groupby

from tierloom.stages.directory.shared import scripts
from tierloom.stages.directory.shared.contract import Directory, Member, Page, name_taken
from tierloom.stages.directory.shared.nodes import FIRST, LARGE, DirectoryNodes
from tierloom.stages.directory.shared.records import (
    NAME,
    WHOLE_NAME,
    Announced,
    Announcement,
    ChunkHolder,
    WorkerRecord,
    epoch_of,
    holders_in,
    number_of,
    pack_changes,
    require_changes,
    require_names,
    turn_of,
    unpack_changes,
    word_of,
)
from tierloom.stages.errors import InputError, TierDown
from tierloom.stages.tiers.redis.resp import Reply, command
from tierloom.stages.tiers.redis.tier import RedisOptions
from tierloom.stages.tiers.redis.topology import RedisNode

_SWEEP_EVERY = 1000  # ms between two sweeps, whoever makes them


class RedisDirectory(Directory):
    """For asyncio only."""

    def __init__(self, options: RedisOptions, *, timeout: float = 1.0) -> None:
        """`timeout`: seconds after which a call raises TierDown."""
        self._nodes = DirectoryNodes(options, timeout)
        self._lives: dict[int, int] = {}  # who joined here: milliseconds that its beat lasts

    async def open(self) -> None:
        await self._nodes.open()

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

    async def announce(self, epoch: int, sequence: int, changes: Sequence[Announcement]) -> bool:
        require_changes(changes)
        life, taken = self._lives.get(epoch), True
        if life is None:
            return False
        number, node_of = number_of(epoch), self._nodes.servers.node_of
        prefix, tagged = self._nodes.prefix, self._nodes.cluster
        everything: tuple[bytes, ...] = (pack_changes(changes),)

        async def tell(node: RedisNode, home: bytes) -> None:
            nonlocal taken
            told = everything
            if tagged:
                mine = pack_changes(c for c in changes if node_of(c.name[NAME:]) is node)
                told = (mine, *everything) if home == self._nodes.home(FIRST) else (mine,)
            said: tuple[bytes | int, ...] = (number, life, epoch, sequence, prefix, int(tagged))
            (done,) = await self._nodes.run(node, [(scripts.ANNOUNCE, home, said + told)])
            taken = taken and done == 1

        await self._nodes.everywhere(tell)
        return taken

    async def find(self, names: Sequence[bytes]) -> list[tuple[ChunkHolder, ...]]:
        require_names(names)
        if not names:
            return []
        groups = [list(group) for _, group in groupby(names, key=self._nodes.place)]
        places = [self._nodes.place(group[0]) for group in groups]
        found: list[Reply] = [None] * len(groups)

        async def ask(node: RedisNode, which: list[int]) -> None:
            home, asked = self._nodes.home_of(node), []
            for i in which:
                short = b"".join([name[:NAME] for name in groups[i]])
                asked.append((scripts.FIND, home, (self._nodes.chunks_at(places[i]), short)))
            limit = 1024 + 256 * len(names)
            for i, reply in zip(which, await self._nodes.run(node, asked, limit), strict=True):
                found[i] = reply

        await self._nodes.each(places, ask)
        prefix: list[tuple[ChunkHolder, ...]] = []
        for group, reply in zip(groups, found, strict=True):
            here = _unfolded(reply, len(group))
            prefix += here
            if len(here) < len(group):
                break
        return prefix

    async def report(self, name: bytes, holder: ChunkHolder) -> None:
        require_names([name])
        place, word = self._nodes.place(name), word_of(*holder)
        key = self._nodes.chunks_at(place) + name[:NAME]

        async def report(node: RedisNode, _: list[int]) -> None:
            await self._nodes.run(node, [(scripts.REPORT, key, (word,))])

        await self._nodes.each([place], report)

    async def events(self, after: Mapping[int, int]) -> dict[int, list[Announced] | None]:
        told = dict[int, list[Announced] | None]()

        async def ask(node: RedisNode, home: bytes) -> None:
            for epoch, sequence in after.items():
                asked = [
                    command("GET", home + b"h%d" % number_of(epoch)),
                    command("XRANGE", home + b"e%d" % epoch, f"({sequence}-0", "+"),
                ]
                at, new = await node.ask(asked, limit=LARGE)
                told[epoch] = _in_order(_sequence(at, epoch), new, sequence)

        await self._nodes.first(ask)
        return told

    async def snapshot(self, epoch: int) -> AsyncIterator[Page]:
        number = number_of(epoch)
        for node in list(self._nodes.servers.nodes):
            home = self._nodes.home_of(node)
            cursor = b"0"
            with self._nodes.in_time():
                (lives,) = await node.ask([command("GET", home + b"h%d" % number)])
            sequence = _sequence(lives, epoch)
            if sequence is None:
                return
            while True:
                what = (self._nodes.prefix, self._nodes.key_bytes, 1000, cursor, number)
                with self._nodes.in_time():
                    (reply,) = await self._nodes.run(node, [(scripts.SNAPSHOT, home, what)], LARGE)
                if not isinstance(reply, list) or not isinstance(reply[0], bytes):
                    raise TierDown("redis: unexpected reply to a snapshot")
                cursor = reply[0]
                pairs = zip(reply[1::2], reply[2::2], strict=False)
                yield Page(sequence, [self._kept(key, word) for key, word in pairs])
                if cursor == b"0":
                    break

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

    def _kept(self, key: Reply, word: Reply) -> tuple[bytes, int]:
        if not isinstance(key, bytes) or not isinstance(word, bytes) or len(word) != 3:
            raise TierDown("redis: unexpected reply to a snapshot")
        digits = key[-NAME - 5 : -NAME - 1] if self._nodes.cluster else b"0000"
        name = key[-NAME:] + bytes.fromhex(digits.decode("ascii", "replace"))
        return name[:WHOLE_NAME], holders_in(word)[0].tiers


def _sequence(beat: Reply, epoch: int) -> int | None:
    """What a worker has come to, by its heartbeat; None: that is another's, or none."""
    whose, _, sequence = beat.partition(b":") if isinstance(beat, bytes) else (b"", b"", b"")
    return int(sequence) if whose == b"%d" % epoch and sequence.isdigit() else None


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


def _in_order(reached: int | None, entries: Reply, sequence: int) -> list[Announced] | None:
    """What follows a sequence without a gap, up to `reached`; None: there is one."""
    told: list[Announced] = []
    for entry in entries if isinstance(entries, list) else []:
        match entry:
            case [bytes(name), [bytes(), bytes(raw)]] if name == b"%d-0" % (sequence + 1):
                sequence += 1
                try:
                    told.append(Announced(sequence, unpack_changes(raw)))
                except InputError:
                    return None
            case _:
                return None
    return told if reached is not None and reached <= sequence else None
