"""The directory of many engines: its contract, in this process and in real servers."""

from __future__ import annotations

import random

import anyio
import numpy as np
import pytest
import servers

from tierloom.stages.directory.shared.chunk_table import ChunkTable
from tierloom.stages.directory.shared.embedded import EmbeddedDirectory
from tierloom.stages.directory.shared.hosted import HostedDirectory
from tierloom.stages.directory.shared.redis_directory import RedisDirectory
from tierloom.stages.tiers.redis.tier import RedisOptions
from tierloom.testing import Clock, DirectoryContract
from tierloom.testing.directories import held, names_of, worker_of

from .standins import hosting


class TestEmbedded(DirectoryContract):
    async def make(self):
        self.clock = Clock()
        return EmbeddedDirectory(self.clock)

    async def empty(self, directory):
        return EmbeddedDirectory(self.clock)

    async def wait(self, seconds):
        self.clock.now += seconds

    async def size(self, directory):
        return len(directory)

    async def test_what_several_have_leaves_nothing_behind(self, directory):
        a, b = await directory.join(worker_of("a")), await directory.join(worker_of("b"))
        names = names_of(1, 20)
        assert await directory.announce(a, 1, held(names))
        for sequence in range(1, 100):
            assert await directory.announce(b, sequence, held(names, sequence % 4))
        assert len(directory._several) == 20
        assert await directory.announce(b, 100, held(names, 0))
        assert len(directory._free) == 20

    async def test_a_table_that_grows_and_shrinks_is_right(self, directory):
        """Against a dictionary, over doublings and with names that share a home."""
        rng, right = random.Random(1), {}
        table = ChunkTable()
        names = [rng.randbytes(1) + bytes(7) + rng.randbytes(8) for _ in range(3000)]
        for _ in range(300):
            some = {name: rng.randrange(1, 1 << 32) for name in rng.sample(names, 20)}
            old = table.add(b"".join(some), np.array(list(some.values()), np.uint32)).tolist()
            assert old == [right.get(name, 0) for name in some]
            right = some | right
            for name in rng.sample(sorted(right), min(len(right), 12)):
                number = rng.randrange(2) * 7
                table.replace(name, number)
                right = {n: v for n, v in (right | {name: number}).items() if v}
            assert len(table) == len(right)
        for name in names:
            assert table.find(name) == ([right[name]] if name in right else [])
        assert sorted(table.names(0, table.slots)) == sorted(right)


@pytest.fixture(scope="module")
def redis():
    with servers.redis() as server:
        yield [server]


@pytest.fixture(scope="module")
def valkey():
    with servers.redis(program_=servers.valkey_program()) as server:
        yield [server]


@pytest.fixture(scope="module")
def cluster():
    with servers.cluster() as nodes:
        yield nodes


class TestHosted(DirectoryContract):
    """An embedded one, asked over a socket of `tierloom serve` by several clients' connections."""

    async def make(self):
        self.clock = Clock()
        self.hosting = hosting(EmbeddedDirectory(self.clock))
        self.host, url = await self.hosting.__aenter__()
        return HostedDirectory(url, timeout=20.0)

    @pytest.fixture
    async def directory(self):
        directory = await self.make()
        yield directory
        await directory.close()
        await self.hosting.__aexit__(None, None, None)

    async def empty(self, directory):
        self.host._directory = EmbeddedDirectory(self.clock)
        return directory

    async def wait(self, seconds):
        self.clock.now += seconds

    async def size(self, directory):
        return len(self.host._directory)


class ServedDirectory(DirectoryContract):
    scheme = "redis"

    def begin(self, running):
        self.running = running
        for server in running:
            servers.ask(server.port, "FLUSHALL")

    async def make(self):
        url = f"{self.scheme}://127.0.0.1:{self.running[0].port}"
        return RedisDirectory(RedisOptions(url=url, stall=10.0), timeout=20.0)

    async def empty(self, directory):
        for server in self.running:
            servers.ask(server.port, "FLUSHALL")
        return directory

    async def wait(self, seconds):
        await anyio.sleep(seconds)

    async def size(self, directory):
        tagged = "{????}" if self.scheme == "redis-cluster" else ""
        keys = "return #redis.call('KEYS', 'tierloom" + tagged + "' .. string.rep('?', 16))"
        said = [servers.ask(server.port, "EVAL", keys, "0") for server in self.running]
        return sum(int(each[1:]) for each in said)


@pytest.mark.server
class TestRedis(ServedDirectory):
    @pytest.fixture(autouse=True)
    def served(self, redis):
        self.begin(redis)


@pytest.mark.server
class TestValkey(ServedDirectory):
    @pytest.fixture(autouse=True)
    def served(self, valkey):
        self.begin(valkey)


@pytest.mark.server
class TestCluster(ServedDirectory):
    scheme = "redis-cluster"

    @pytest.fixture(autouse=True)
    def served(self, cluster):
        self.begin(cluster)
