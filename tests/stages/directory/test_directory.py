"""The directory of many engines: its contract, in this process and in real servers."""

from __future__ import annotations

import anyio
import pytest
import servers

from tierloom.stages.directory.shared.embedded import EmbeddedDirectory
from tierloom.stages.directory.shared.redis_directory import RedisDirectory
from tierloom.stages.tiers.redis.tier import RedisOptions
from tierloom.testing import Clock, DirectoryContract


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


class ServedDirectory(DirectoryContract):
    scheme = "redis"

    def begin(self, running):
        self.running = running
        for server in running:
            servers.ask(server.port, "FLUSHALL")

    async def make(self):
        url = f"{self.scheme}://127.0.0.1:{self.running[0].port}"
        directory = RedisDirectory(RedisOptions(url=url), timeout=5.0)
        await directory.open()
        return directory

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
