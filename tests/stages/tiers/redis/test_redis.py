"""redis: the contract on real servers, and what they may do to objects."""

from __future__ import annotations

import anyio
import pytest
from servers import ask, redis, valkey_program

from tierloom.stages.tiers.redis.tier import Redis, RedisOptions
from tierloom.testing import TierBench, TierContract


def url_of(server, path="/0"):
    return f"redis://127.0.0.1:{server.port}{path}"


@pytest.fixture(scope="module")
def server():
    with redis("--maxmemory-policy", "allkeys-lru") as server:
        yield server


class RedisBench(TierBench):
    @pytest.fixture
    def anyio_backend(self):
        """The pipeline's loop is asyncio, and so is this tier."""
        return "asyncio"

    @pytest.fixture(autouse=True)
    def empty(self, server):
        ask(server.port, "FLUSHALL")
        self.server = server

    def make(self, ctx, folder, clock, **options):
        return Redis(RedisOptions(**({"url": url_of(self.server)} | options)), ctx)

    async def lands(self, tier, *seeds):
        """Put until all is kept: a server that is back is found within moments."""
        for _ in range(1000):
            if await self.put(tier, *seeds) == [None] * len(seeds):
                return
            await anyio.sleep(0.02)
        pytest.fail("stores do not land again")

    def keys(self, pattern="*"):
        said = ask(self.server.port, "KEYS", pattern).split("\r\n")[1:]
        return sorted(line for line in said if line and line[0] != "$")

    def pieces(self):
        return [key for key in self.keys() if not key.endswith("}")]


class RedisContract(RedisBench, TierContract):
    """Whoever evicts is the server; whose clock counts is the server's."""

    ttl = False
    bounded = False

    def damage(self, tier, key, change):
        """The object's bytes as they lie in the server: header in the manifest, then pieces."""
        name = tier._name(key).decode()
        parts = [name, *sorted(k for k in self.keys() if k.startswith(name + ":"))]
        values = [self.value(part) for part in parts]
        sizes = [len(values[0]) - 24, *map(len, values[1:])]
        raw = bytearray(values[0][24:] + b"".join(values[1:]))
        change(raw)
        prefix = values[0][:24]
        for part, size in zip(parts, sizes, strict=True):
            mine, raw = raw[:size], raw[size:]
            ask(self.server.port, "SET", part, prefix + mine if part == name else bytes(mine))

    def value(self, name):
        return ask(self.server.port, "GET", name).encode("latin-1").split(b"\r\n", 1)[1][:-2]


class TestRedis(RedisContract):
    pass


class TestPieces(RedisContract):
    """Pieces that end where no frame does."""

    def make(self, ctx, folder, clock, **options):
        tier = super().make(ctx, folder, clock, **options)
        object.__setattr__(tier.options, "piece", 10_000)
        return tier


@pytest.fixture(scope="module")
def valkey():
    with redis(program_=valkey_program()) as server:
        yield server


class TestValkey(RedisContract):
    @pytest.fixture
    def server(self, valkey):
        return valkey


@pytest.mark.parametrize("which", ["server", "valkey"])
def test_a_piece_takes_as_much_memory_as_it_has_bytes(which, request):
    """Allocators round up: of a value of 1 MiB to 1.25."""
    port = request.getfixturevalue(which).port
    piece = RedisOptions(url="redis://localhost").piece
    ask(port, "SET", "piece", bytes(piece))
    assert int(ask(port, "MEMORY", "USAGE", "piece")[1:]) < 1.01 * piece
