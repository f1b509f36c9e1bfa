"""redis behind sentinels, and in a cluster: nodes die, and what is left serves on."""

from __future__ import annotations

import time
from types import SimpleNamespace

import anyio
import pytest
import servers

from tierloom.stages.errors import ConfigError, Lost, TierDown
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.net.address import Address
from tierloom.stages.tiers.redis.cluster import _ranges
from tierloom.stages.tiers.redis.tier import Redis, RedisOptions
from tierloom.testing import SIZE, key_of

from .standins import Liar
from .test_redis import RedisBench

pytestmark = pytest.mark.timeout(180)


def limits(timeout=1.0, fails=3, probe=0.2):
    return SimpleNamespace(timeout=timeout, fails=fails, probe=probe)


class ManyBench(RedisBench):
    @pytest.fixture(autouse=True)
    def empty(self):
        """Servers of the test's own."""

    def make(self, ctx, folder, clock, **options):
        return Redis(RedisOptions(**options), ctx)


class TestSentinel(ManyBench):
    @pytest.mark.anyio
    async def test_the_master_dies_while_it_stores(self, ctx, tmp_path, clock, arena):
        """Misses at most meanwhile; stores land again; what is read is right, always."""
        right = {seed: self.bytes_of(arena, seed) for seed in range(40)}
        with servers.sentinels() as ((master, replica), watchers):
            hosts = ",".join(f"127.0.0.1:{w.port}" for w in watchers)
            inner = self.make(ctx, tmp_path, clock, url=f"redis-sentinel://{hosts}/kv")
            tier = CircuitBreaker(inner, "cold", limits())
            await tier.open()
            assert await self.put(tier, *range(5)) == [None] * 5
            replica.wait_until(lambda: servers.ask(replica.port, "DBSIZE") == ":10\r\n")
            kept, killed, back = 0, 0.0, 0.0
            with anyio.fail_after(60):
                for n in range(10_000):
                    seed = n % 40
                    if n == 30:
                        master.child.kill()  # while what comes next is under way
                        killed = time.monotonic()
                    stored = (await self.put(tier, seed))[0]
                    assert stored in (None, Lost.TIER_DOWN, Lost.LATE)
                    got = await self.get(tier, seed)
                    assert got in (right[seed], Lost.ABSENT, Lost.TIER_DOWN, Lost.LATE)
                    if killed and not back and stored is None and n > 31:
                        back = time.monotonic()
                    kept += bool(back) and got == right[seed]
                    if kept == 20:
                        break
                    await anyio.sleep(0.01)
            master.child.wait()
            print(f"stores land again {back - killed:.2f} s after the master's death")
            for seed in range(5):
                assert await self.get(tier, seed) == right[seed], "the replica had it"
            assert "role:master" in servers.ask(replica.port, "INFO", "replication")
            await tier.close()

    @pytest.mark.anyio
    async def test_sentinels_that_are_gone_hang_or_lie(self, ctx, tmp_path, clock, arena):
        with servers.sentinels() as (_, watchers):
            watchers[0].kill()
            watchers[1].pause()

            def another(words):
                return b"*-1\r\n" if words[0] == b"SENTINEL" else b"+PONG\r\n"

            async with Liar(another) as liar:
                hosts = ",".join(
                    f"127.0.0.1:{p}" for p in (*(w.port for w in watchers[:2]), liar.port)
                )
                url = f"redis-sentinel://{hosts},127.0.0.1:{watchers[2].port}/kv"
                options = {"url": url, "stall": 0.3}
                async with self.opened(ctx, tmp_path, clock, **options) as tier:
                    assert await self.put(tier, 1) == [None]
                    assert await self.get(tier, 1) == self.bytes_of(arena, 1)
                tier = self.make(ctx, tmp_path, clock, url=url.replace("/kv", "/vk"), stall=0.3)
                with pytest.raises(TierDown, match="no sentinel knows a master of 'vk'"):
                    await tier.open()
                await tier.close()

    @pytest.mark.anyio
    async def test_a_sentinel_that_names_a_replica(self, ctx, tmp_path, clock):
        """As it does for a moment in a failover: nothing is stored there."""
        with servers.redis() as master:
            follow = ["--replicaof", "127.0.0.1", str(master.port)]
            with servers.redis(*follow) as replica:
                port = b"%d" % replica.port

                def wrong(words):
                    if words[0] == b"SENTINEL":
                        return b"*2\r\n$9\r\n127.0.0.1\r\n$%d\r\n%b\r\n" % (len(port), port)
                    return b"+PONG\r\n"

                async with Liar(wrong) as liar:
                    url = f"redis-sentinel://127.0.0.1:{liar.port}/kv"
                    tier = self.make(ctx, tmp_path, clock, url=url)
                    with pytest.raises(TierDown, match="no longer the master of kv"):
                        await tier.open()
                    await tier.close()

    @pytest.mark.anyio
    async def test_passwords_of_sentinels(self, ctx, tmp_path, clock):
        """One that asks for a password gets the url's; one that does not, none."""
        with servers.redis("--requirepass", "pw") as master:
            port = b"%d" % master.port
            for asks in (False, True):
                heard = []

                def answer(words, asks=asks, heard=heard):
                    heard.append(words)
                    if words[0] == b"SENTINEL":
                        return b"*2\r\n$9\r\n127.0.0.1\r\n$%d\r\n%b\r\n" % (len(port), port)
                    known = any(w[0] == b"AUTH" for w in heard)
                    return b"-NOAUTH\r\n" if asks and not known else b"+OK\r\n"

                async with Liar(answer) as liar:
                    url = f"redis-sentinel://:pw@127.0.0.1:{liar.port}/kv/2"
                    async with self.opened(ctx, tmp_path, clock, url=url) as tier:
                        assert await self.put(tier, 1 + asks) == [None]
                assert ([b"AUTH", b"pw"] in heard) is asks


class TestCluster(ManyBench):
    @pytest.mark.anyio
    async def test_a_node_dies(self, ctx, tmp_path, clock, arena):
        """Objects lie whole on one node each; of three, two thirds are served on."""
        seeds = range(60)
        keys = [key_of(seed) for seed in seeds]
        with servers.cluster() as nodes:
            url = "redis-cluster://" + ",".join(f"127.0.0.1:{n.port}" for n in nodes[:2])
            inner = self.make(ctx, tmp_path, clock, url=url, stall=0.4)
            tier = CircuitBreaker(inner, "cold", limits(timeout=3.0))
            await tier.open()
            object.__setattr__(inner.options, "piece", 10_000)
            assert await self.put(tier, *seeds) == [None] * 60
            assert all(await tier.exists(keys))
            for node in nodes:
                names = servers.ask(node.port, "KEYS", "*").split("\r\n")[2::2]
                whole = [n for n in names if n.endswith("}")]
                assert len(whole) > 5
                assert len(names) == len(whole) * (1 + -(-(SIZE - 4096) // 10_000))
            lost_before = {s: inner._servers.node_of(key_of(s)) for s in seeds}
            dead = inner._servers._by_address[Address("127.0.0.1", nodes[2].port)]
            on_dead = {s for s in seeds if lost_before[s] is dead}
            assert 5 < len(on_dead) < 40

            for kill in (nodes[2].pause, nodes[2].kill):
                kill()
                for _ in range(5):
                    found = await tier.exists(keys)
                    assert {s for s in seeds if not found[s]} == on_dead
                    assert tier.available, "one node is not the tier"
                for seed in seeds:
                    got = await self.get(tier, seed)
                    if seed in on_dead:
                        assert got in (Lost.TIER_DOWN, Lost.LATE)
                    else:
                        assert got == self.bytes_of(arena, seed)
                outcome = await self.put(tier, *range(60, 90))
                assert outcome.count(None) > 10
                assert set(outcome) <= {None, Lost.TIER_DOWN}
                assert tier.available

            nodes[2].start()  # empty, since it keeps nothing on disk
            with anyio.fail_after(30):
                while not all(await tier.exists(keys)):
                    await self.put(tier, *seeds)
                    await anyio.sleep(0.1)
            assert await tier.clear() >= 60
            assert not any(await tier.exists(keys))
            for node in nodes:
                node.kill()
            with anyio.fail_after(30):
                while tier.available:
                    assert not any(await tier.exists(keys))
            await tier.close()
        assert arena.leases == 0

    @pytest.mark.anyio
    async def test_slots_that_move(self, ctx, tmp_path, clock, arena):
        """A miss at most, until we know where they are."""
        with servers.cluster() as nodes:
            url = f"redis-cluster://127.0.0.1:{nodes[0].port}"
            async with self.opened(ctx, tmp_path, clock, url=url) as tier:
                slot = str(servers.ask(nodes[0].port, "CLUSTER", "KEYSLOT", key_of(1).hex())[1:-2])
                old = tier._servers.node_of(key_of(1))
                ports = {a.port: n for a, n in tier._servers._by_address.items()}
                target = next(n for n in nodes if ports[n.port] is not old)
                mine = servers.ask(target.port, "CLUSTER", "MYID").split("\r\n")[1]
                for node in nodes:
                    servers.ask(node.port, "CLUSTER", "SETSLOT", slot, "NODE", mine)
                await self.lands(tier, 1)
                assert await self.get(tier, 1) == self.bytes_of(arena, 1)
                assert tier._servers.node_of(key_of(1)) is not old
                assert all(node.error is None for node in tier._servers.nodes)

    @pytest.mark.anyio
    async def test_a_cluster_taken_for_one_server(self, ctx, tmp_path, clock):
        with servers.cluster() as nodes:
            url = f"redis://127.0.0.1:{nodes[0].port}"
            async with self.opened(ctx, tmp_path, clock, url=url) as tier:
                with pytest.raises(TierDown, match="begins with redis-cluster://"):
                    await tier.exists([key_of(seed) for seed in range(20)])

    @pytest.mark.anyio
    async def test_no_cluster(self, ctx, tmp_path, clock):
        with servers.redis() as plain:
            url = f"redis-cluster://127.0.0.1:{plain.port}"
            tier = self.make(ctx, tmp_path, clock, url=url)
            with pytest.raises(TierDown, match="does not report its slots"):
                await tier.open()
            await tier.close()
        with servers.redis("--requirepass", "pw") as locked:
            url = f"redis-cluster://127.0.0.1:{locked.port}"
            tier = self.make(ctx, tmp_path, clock, url=url)
            with pytest.raises(ConfigError, match="NOAUTH"):
                await tier.open()
            await tier.close()


@pytest.mark.parametrize(
    "answer",
    [None, 7, b"x", [], [7], [[0, 16384, [b"h", 1]]], [[5, 4, [b"h", 1]]], [[0, 5, [b"h"]]],
     [[0, 5, [7, 1]]], [[0, 5]], [[0, 5, [b"h", b"1"]]]],
)  # fmt: skip
def test_tables_of_slots_that_are_none(answer) -> None:
    with pytest.raises(TierDown):
        _ranges(answer, "h")


def test_a_table_of_slots() -> None:
    answer = [[0, 9, [b"a", 1, b"id", []], [b"b", 2]], [10, 16383, [b"", 3]]]
    assert _ranges(answer, "me") == [(0, 9, Address("a", 1)), (10, 16383, Address("me", 3))]
