"""The directory in Redis: servers that die, are full, may not be written, or hold garbage."""

from __future__ import annotations

from contextlib import suppress

import anyio
import pytest
import servers
from hypothesis import given, settings, strategies as st

from tierloom.stages.directory.shared.announcer import Announcer
from tierloom.stages.directory.shared.records import ChunkHolder, number_of
from tierloom.stages.directory.shared.redis_directory import RedisDirectory, _unfolded
from tierloom.stages.errors import ConfigError, TierDown
from tierloom.stages.tiers.redis.tier import RedisOptions
from tierloom.testing.directories import held, names_of, worker_of

from .test_announcer import finds, until

pytestmark = [pytest.mark.anyio, pytest.mark.server]
NAMES = names_of(1, 40)


@pytest.fixture
def anyio_backend():
    return "asyncio"


async def opened(server, url="redis://127.0.0.1:{port}", within=20.0, **options):
    said = RedisOptions(url=url.format(port=server.port), **({"stall": 10.0} | options))
    return RedisDirectory(said, timeout=within)


async def test_a_server_that_hangs_dies_and_comes_back_empty() -> None:
    with servers.redis() as server:
        directory = await opened(server, within=0.4, stall=0.3)
        announcer = Announcer(directory, worker_of("a", heartbeat=0.1))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(announcer.run)
            for name in NAMES:
                announcer.note(name, 0, True)
            await finds(directory, NAMES, 40)
            with server.paused(), anyio.fail_after(10), pytest.raises(TierDown):
                await directory.find(NAMES)
            server.kill()
            with anyio.fail_after(10), pytest.raises(TierDown):
                await directory.find(NAMES)
            with pytest.raises(TierDown):
                await directory.workers()
            server.start()
            await until(lambda: _is_back(directory))
            tasks.cancel_scope.cancel()
        await directory.close()


async def _is_back(directory):
    try:
        return len(await directory.find(NAMES)) == 40
    except TierDown:
        return False


async def test_a_replica_is_read_and_not_written() -> None:
    with servers.redis("--repl-diskless-sync-delay", "0") as master:
        follow = ["--replicaof", "127.0.0.1", str(master.port)]
        with servers.redis(*follow) as replica:
            writer, reader = await opened(master), await opened(replica)
            epoch = await writer.join(worker_of("a", heartbeat=60.0))
            assert await writer.announce(epoch, 1, held(NAMES))
            await finds(reader, NAMES, 40)
            assert set(await reader.workers()) == {number_of(epoch)}
            for call in (
                reader.join(worker_of("b")), reader.sweep(),
                reader.report(NAMES[0], ChunkHolder(number_of(epoch), 1)),
            ):  # fmt: skip
                with pytest.raises(TierDown, match="READONLY: this server is a replica"):
                    await call
            for directory in (writer, reader):
                await directory.close()


async def test_a_full_server_takes_nothing_and_forgets_nobody() -> None:
    """It is told when there is room again; until then whoever was known lives on."""
    with servers.redis() as server:
        directory = await opened(server)
        announcer = Announcer(directory, worker_of("a", heartbeat=0.5))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(announcer.run)
            for name in NAMES[:20]:
                announcer.note(name, 0, True)
            await finds(directory, NAMES, 20)
            servers.ask(server.port, "CONFIG", "SET", "maxmemory", "1")
            with pytest.raises(TierDown, match="OOM: it is full: raise maxmemory"):
                await directory.join(worker_of("b"))
            for name in NAMES[20:]:
                announcer.note(name, 0, True)
            for _ in range(14):
                await anyio.sleep(0.1)
                assert len(await directory.find(NAMES)) == 20
            servers.ask(server.port, "CONFIG", "SET", "maxmemory", "0")
            await finds(directory, NAMES, 40)
            assert announcer.snapshots == 1
            tasks.cancel_scope.cancel()
        await directory.close()


async def test_garbage_in_the_server() -> None:
    with servers.redis() as server:
        directory = await opened(server)
        epoch = await directory.join(worker_of("a", heartbeat=60.0))
        assert await directory.announce(epoch, 1, held(NAMES))
        servers.ask(server.port, "SCRIPT", "FLUSH")
        assert len(await directory.find(NAMES)) == 40
        good = servers.ask(server.port, "GET", b"tierloom" + NAMES[0][:16])[4:7].encode("latin-1")
        for value, count in ((b"", 0), (b"x", 0), (b"\xff" * 300, 0), (good + b"zz", 40)):
            servers.ask(server.port, "SET", b"tierloom" + NAMES[0][:16], value)
            assert len(await directory.find(NAMES)) == count
        for field, value in (("7", "no record"), ("x", ""), ("9", "3 {}"), ("nq/0", "what")):
            servers.ask(server.port, "HSET", "tierloom!w", field, value)
            servers.ask(server.port, "SET", f"tierloom!h{field}", "0")
        assert set(await directory.workers()) == {number_of(epoch)}
        servers.ask(server.port, "DEL", "tierloom!w")
        assert not await directory.beat(epoch, 1), "workers may be evicted, too"
        epoch = await directory.join(worker_of("a", heartbeat=60.0), first=epoch, last=epoch)
        assert await directory.announce(epoch, 1, held(NAMES))
        servers.ask(server.port, "SET", f"tierloom!h{number_of(epoch)}", "no number")
        assert not await directory.beat(epoch, 1)
        servers.ask(server.port, "DEL", b"tierloom" + NAMES[5][:16])
        servers.ask(server.port, "RPUSH", b"tierloom" + NAMES[5][:16], "a list")
        with pytest.raises(TierDown):
            await directory.find(NAMES)
        assert len(await directory.find(NAMES[:5])) == 5
        await directory.close()


async def test_entries_of_the_dead_do_not_hide_the_living() -> None:
    """10^4 stale entries here, 10^6 in benchmarks/directory."""
    with servers.redis() as server:
        directory = await opened(server)
        names = [names_of(seed, 1000) for seed in range(10)]
        dead = await directory.join(worker_of("dead", heartbeat=60.0))
        for i, some in enumerate(names):
            assert await directory.announce(dead, 1 + i, held(some))
        lives = await directory.join(worker_of("a", heartbeat=60.0))
        assert await directory.announce(lives, 1, held(names[3][:64]))
        servers.ask(server.port, "DEL", f"tierloom!h{number_of(dead)}")
        found = await directory.find(names[3])
        assert found == [(ChunkHolder(number_of(lives), 1),)] * 64
        assert await directory.find(names[4]) == []
        await directory.close()


async def test_passwords_and_tls(tmp_path, monkeypatch) -> None:
    certificates = servers.Certificates(tmp_path)
    users = ["--user", "default", "off", "--user", "kv", "on", ">pw", "~tierloom*", "+@all"]
    monkeypatch.setenv("KV_PASSWORD", "pw")
    with servers.redis(*certificates.options(), *users) as server:
        url, tls = "rediss://kv@localhost:{port}", {"ca_file": str(certificates.ca)}
        directory = await opened(server, url, password_env="KV_PASSWORD", **tls)
        epoch = await directory.join(worker_of("a"))
        assert await directory.announce(epoch, 1, held(NAMES))
        assert len(await directory.find(NAMES)) == 40
        await directory.close()
        monkeypatch.setenv("KV_PASSWORD", "wrong")
        directory = await opened(server, url, password_env="KV_PASSWORD", **tls)
        with pytest.raises(ConfigError, match="rejects user 'kv'"):
            await directory.find(NAMES)
        await directory.close()


@pytest.mark.timeout(180)
async def test_the_master_dies() -> None:
    """What the replica has is found there, and what it lacks is told."""
    with servers.sentinels() as ((master, _), watchers):
        hosts = ",".join(f"127.0.0.1:{w.port}" for w in watchers)
        said = RedisOptions(url=f"redis-sentinel://{hosts}/kv", stall=0.5)
        directory = RedisDirectory(said, timeout=1.0)
        announcer = Announcer(directory, worker_of("a", heartbeat=0.5))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(announcer.run)
            for name in NAMES[:20]:
                announcer.note(name, 0, True)
            await finds(directory, NAMES, 20)
            master.kill()
            for name in NAMES[20:]:
                announcer.note(name, 0, True)
            await until(lambda: _is_back(directory))
            tasks.cancel_scope.cancel()
        await directory.close()


@pytest.mark.timeout(180)
async def test_a_node_of_a_cluster_dies() -> None:
    """A prompt is found up to the first chunk that was there; when the node is back, empty, all is
    told anew."""
    with servers.cluster() as nodes:
        prompts = [names_of(seed, 16) for seed in range(30)]
        said = RedisOptions(url=f"redis-cluster://127.0.0.1:{nodes[0].port}", stall=0.4)
        directory = RedisDirectory(said, timeout=2.0)
        announcer = Announcer(directory, worker_of("a", heartbeat=1.0))

        async def lengths():
            found = []
            for names in prompts:
                with suppress(TierDown):
                    found.append(len(await directory.find(names)))
            return found

        async def all_found():
            return await lengths() == [16] * 30

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(announcer.run)
            for names in prompts:
                for name in names:
                    announcer.note(name, 0, True)
            await until(all_found)
            victim = next(
                i for i in (1, 2)
                if _node(directory, nodes[i]) is not directory._nodes.servers.node_of(bytes(2))
            )  # fmt: skip
            gone, node_of = _node(directory, nodes[victim]), directory._nodes.servers.node_of
            left = [[node_of(name[:2]) is not gone for name in names] for names in prompts]
            nodes[victim].kill()
            for _ in range(5):
                assert await lengths() == [[*there, False].index(False) for there in left]
            nodes[victim].start()
            await until(all_found)
            tasks.cancel_scope.cancel()
        await directory.close()


def _node(directory, server):
    return next(n for a, n in directory._nodes.servers._by_address.items() if a.port == server.port)


replies = st.recursive(
    st.none() | st.integers(-5, 100) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(replies)
def test_replies_that_nobody_sends(one) -> None:
    with suppress(TierDown):
        assert len(_unfolded(one, 8)) <= 8
