"""redis that loses pieces, is full, goes away or is shared: never a wrong byte, never a wait."""

from __future__ import annotations

from types import SimpleNamespace

import anyio
import pytest
from servers import ask, redis

from tierloom.stages.errors import Lost, Refused
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.tier import Read, TierContext
from tierloom.stages.tiers.redis import writes as module
from tierloom.testing import ALL, FRAMES, SIZE, key_of, make_object, verify

from .standins import Liar, Valve
from .test_redis import RedisBench, server, url_of  # noqa: F401 (a fixture)


def limits(timeout=0.3, fails=2, probe=0.1):
    return SimpleNamespace(timeout=timeout, fails=fails, probe=probe)


class TestTorn(RedisBench):
    @pytest.mark.anyio
    @pytest.mark.parametrize("number", range(3))
    async def test_an_evicted_piece_is_a_miss_and_the_rest_is_dropped(self, tier, arena, number):
        object.__setattr__(tier.options, "piece", FRAMES * 16384 // 3)
        await self.put(tier, 1, 2)
        name = tier._name(key_of(1)).decode()
        pieces = [key for key in self.pieces() if key.startswith(name)]
        assert len(pieces) == 3
        ask(self.server.port, "UNLINK", pieces[number])
        assert await tier.exists([key_of(1)]) == [True]
        assert await self.get(tier, 1) is Lost.ABSENT
        assert not [key for key in self.keys() if key.startswith(name)]
        assert tier.counts.extra["torn"] == 1
        assert tier.stat()[:2] == (1, SIZE)
        assert await self.get(tier, 2) == self.bytes_of(arena, 2)
        assert await self.put(tier, 1) == [None]
        assert await self.get(tier, 1) == self.bytes_of(arena, 1)

    @pytest.mark.anyio
    @pytest.mark.parametrize("nbytes", [1, 300_000, 5 << 20])
    async def test_a_manifest_that_somebody_made_longer(self, tier, arena, nbytes):
        """It costs its own object, not the call, and no more memory than a manifest has."""
        await self.put(tier, 1, 2)
        ask(self.server.port, "APPEND", tier._name(key_of(1)), bytes(nbytes))
        reads = [Read(key_of(1), ALL), Read(key_of(2), ALL)]
        await tier.read(reads)
        assert [read.lost for read in reads] == [Lost.CORRUPT, None]
        assert reads[1].object is not None
        reads[1].object.lease.release()
        assert await tier.exists([key_of(1), key_of(2)]) == [False, True]
        assert await self.put(tier, 1) == [None]
        assert await self.get(tier, 1) == self.bytes_of(arena, 1)

    @pytest.mark.anyio
    @pytest.mark.parametrize("change", ["longer", "much longer", "shorter", "empty", "a list"])
    @pytest.mark.parametrize("window", [1, 3])
    async def test_a_piece_of_another_length_spoils_no_other(self, tier, arena, change, window):
        object.__setattr__(tier.options, "window", window)
        await self.put(tier, *range(6))
        name = tier._name(key_of(3)).decode()
        (piece,) = [key for key in self.pieces() if key.startswith(name)]
        value = {"longer": "x" * 49153, "much longer": "x" * (5 << 20), "shorter": "x" * 100}
        if change == "a list":
            ask(self.server.port, "UNLINK", piece)
            ask(self.server.port, "RPUSH", piece, "x")
        else:
            ask(self.server.port, "SET", piece, value.get(change, ""))
        reads = [Read(key_of(seed), ALL) for seed in range(6)]
        await tier.read(reads)
        for seed, read in enumerate(reads):
            if seed == 3:
                assert read.object is None
                assert read.lost in (Lost.CORRUPT, Lost.ABSENT)
            else:
                assert verify(read.object, read.key) == self.bytes_of(arena, seed)
                read.object.lease.release()
        assert await tier.exists([key_of(3)]) == [False]

    @pytest.mark.anyio
    @pytest.mark.parametrize("value", ["", "TLR1", "x" * 5000, "x" * 400_000])
    async def test_a_foreign_manifest(self, tier, value):
        ask(self.server.port, "SET", tier._name(key_of(1)), value)
        assert await self.get(tier, 1) is Lost.CORRUPT
        assert await tier.exists([key_of(1)]) == [False]

    @pytest.mark.anyio
    @pytest.mark.parametrize("words", [("SET", "TLR2" + "x" * 5000), ("RPUSH", "x")])
    async def test_a_manifest_that_is_not_for_this_version_stays(self, tier, words):
        name = tier._name(key_of(1))
        ask(self.server.port, words[0], name, words[1])
        for _ in range(2):
            assert await self.get(tier, 1) is (Lost.NEWER if words[0] == "SET" else Lost.FOREIGN)
            assert await tier.exists([key_of(1)]) == [True]
        assert tier.counts.corrupt == 0
        assert await tier.delete([key_of(1)]) == 1
        assert await tier.exists([key_of(1)]) == [False]

    @pytest.mark.anyio
    async def test_what_was_loaded_is_never_written_again(self, tier, arena):
        """Who decodes a frame may be reading it while the next one comes."""
        object.__setattr__(tier.options, "piece", 10_000)
        await self.put(tier, 1)
        first = Read(key_of(1), 1)
        await tier.read([first])
        view = first.object.lease.view
        end = first.object.header.frames[0].offset + first.object.header.frames[0].stored
        right, view[4096:end] = bytes(view[4096:end]), b"\xee" * (end - 4096)
        for upto in (2, ALL):
            read = Read(key_of(1), upto, first.object)
            await tier.read([read])
            assert read.lost is None
            assert bytes(view[4096:end]) == b"\xee" * (end - 4096)
        view[4096:end] = right
        assert verify(first.object, key_of(1)) == self.bytes_of(arena, 1)
        first.object.lease.release()

    @pytest.mark.anyio
    async def test_another_object_took_the_place(self, tier):
        await self.put(tier, 1)
        first = Read(key_of(1), 1)
        await tier.read([first])
        await tier.delete([key_of(1)])
        other = make_object(tier.ctx.arena, 1)
        view = other.lease.view
        view[other.header.frames[1].offset] ^= 1
        other.seal([0, 0, 0])
        assert await tier.put([other]) == [None]
        other.lease.release()
        again = Read(key_of(1), ALL, first.object)
        await tier.read([again])
        assert again.lost is Lost.ABSENT
        first.object.lease.release()


class TestWriting(RedisBench):
    @pytest.mark.anyio
    async def test_write_once(self, ctx, tmp_path, clock, arena):
        """Two writers of one key at once: one object, one set of pieces."""
        async with (
            self.opened(ctx, tmp_path, clock) as one,
            self.opened(ctx, tmp_path, clock) as two,
        ):
            for seed in range(10):
                async with anyio.create_task_group() as group:
                    group.start_soon(self.put, one, seed)
                    group.start_soon(self.put, two, seed)
                assert len(self.pieces()) == seed + 1
            assert one.counts.puts + two.counts.puts == 10
            before = self.keys()
            assert await self.put(two, *range(10)) == [None] * 10
            assert self.keys() == before
            assert await self.get(one, 5) == self.bytes_of(arena, 5)

    @pytest.mark.anyio
    async def test_a_writer_that_is_gone_leaves_nothing_to_see(self, ctx, tmp_path, clock):
        async with Valve(self.server.port) as valve:
            url = f"redis://127.0.0.1:{valve.port}"
            async with self.opened(ctx, tmp_path, clock, url=url) as tier:
                valve.left = 4 + 7 + 2  # EXISTS, PING, and half of the first piece's answer
                object.__setattr__(tier.options, "piece", 10_000)
                async with anyio.create_task_group() as group:
                    group.start_soon(self.put, tier, 1)
                    await valve.shut.wait()
                    group.cancel_scope.cancel()
                assert self.pieces()
                assert not [key for key in self.keys() if key.endswith("}")]
                for key in self.pieces():
                    assert 0 < int(ask(self.server.port, "PTTL", key)[1:]) <= 300_000
        async with self.opened(ctx, tmp_path, clock) as tier:
            assert await self.get(tier, 1) is Lost.ABSENT
            assert await self.put(tier, 1) == [None]
            assert isinstance(await self.get(tier, 1), bytes)

    @pytest.mark.anyio
    async def test_a_piece_evicted_before_the_manifest_is_written(
        self, ctx, tmp_path, clock, monkeypatch
    ):
        """Then there is no manifest, and no other piece."""
        async with Valve(self.server.port) as valve:
            url = f"redis://127.0.0.1:{valve.port}"
            async with self.opened(ctx, tmp_path, clock, url=url) as tier:
                object.__setattr__(tier.options, "piece", 10_000)
                monkeypatch.setattr(module, "_AHEAD", 1)
                valve.left = 4 + 7 + 2  # EXISTS, PING, and half of the first piece's answer
                outcome = []

                async def put():
                    outcome.extend(await self.put(tier, 1))

                async with anyio.create_task_group() as group:
                    group.start_soon(put)
                    await valve.shut.wait()
                    ask(self.server.port, "UNLINK", self.pieces()[0])
                    valve.left = 1 << 60
                    valve.opened.set()
                assert outcome == [Lost.NO_ROOM]
                assert self.keys() == []

    @pytest.mark.anyio
    async def test_time_to_live(self, ctx, tmp_path, clock):
        async with self.opened(ctx, tmp_path, clock, ttl=1) as tier:
            await self.put(tier, 1)
            assert await tier.exists([key_of(1)]) == [True]
            with anyio.fail_after(20):
                while await tier.exists([key_of(1)]) != [False]:  # noqa: ASYNC110
                    await anyio.sleep(0.05)
            assert self.keys() == []
        async with self.opened(ctx, tmp_path, clock, ttl=0) as tier:
            await self.put(tier, 1)
            assert {ask(self.server.port, "PTTL", key) for key in self.keys()} == {":-1\r\n"}

    @pytest.mark.anyio
    async def test_what_is_read_lives_longer(self, ctx, tmp_path, clock):
        async with self.opened(ctx, tmp_path, clock, ttl=100.0) as tier:
            await self.put(tier, 1, 2)
            for key in self.keys():
                ask(self.server.port, "PEXPIRE", key, "40000")
            assert isinstance(await self.get(tier, 1), bytes)
            left = {k: int(ask(self.server.port, "PTTL", k)[1:]) for k in self.keys()}
            mine = [n for k, n in left.items() if key_of(1).hex() in k]
            other = [n for k, n in left.items() if key_of(2).hex() in k]
            assert len(mine) == len(other) == 2
            assert min(mine) > 90_000
            assert max(other) <= 40_000

    @pytest.mark.anyio
    async def test_no_room(self, ctx, tmp_path, clock, caplog):
        with redis("--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as small:
            inner = self.make(ctx, tmp_path, clock, url=url_of(small))
            tier = CircuitBreaker(inner, "cold", limits(5), clock=clock)
            await tier.open()
            outcome = [(await self.put(tier, seed))[0] for seed in range(60)]
            kept = outcome.index(Lost.NO_ROOM)
            assert kept > 5
            assert outcome == [None] * kept + [Lost.NO_ROOM] * (60 - kept)
            assert tier.counts.refused == 1, "it is not asked again before a minute is over"
            assert tier.stat().objects == kept
            there = await tier.exists([key_of(seed) for seed in range(60)])
            assert there == [seed < kept for seed in range(60)]
            self.server = small
            assert len(self.keys()) == 2 * kept, "pieces without a manifest"
            assert isinstance(await self.get(tier, 0), bytes)
            (said,) = [r.message for r in caplog.records]
            assert "takes nothing, and serves what it has: redis: OOM" in said
            await tier.delete([key_of(seed) for seed in range(3)])
            assert await self.put(tier, 70) == [None]
            await tier.close()

    @pytest.mark.anyio
    @pytest.mark.parametrize("why", ["READONLY", "MISCONF", "NOPERM"])
    async def test_a_server_that_takes_no_writes_is_read(self, ctx, tmp_path, clock, caplog, why):
        folder = tmp_path / "rdb"
        folder.mkdir()
        with redis("--save", "3600 1", "--dir", str(folder)) as other:
            inner = self.make(ctx, tmp_path, clock, url=url_of(other))
            tier = CircuitBreaker(inner, "cold", limits(5), clock=clock)
            await tier.open()
            assert await self.put(tier, 1) == [None]
            if why == "READONLY":
                ask(other.port, "REPLICAOF", "127.0.0.1", "1")
            elif why == "NOPERM":
                ask(other.port, "ACL", "SETUSER", "default", "-@write")
            else:
                folder.rmdir()
                await self.cannot_save(other)
            for _ in range(5):
                assert await self.put(tier, 2) == [Lost.REFUSED]
                assert await tier.exists([key_of(1)]) == [True]
                assert isinstance(await self.get(tier, 1), bytes)
            assert tier.available
            (said,) = [r.message for r in caplog.records]
            assert f"takes nothing, and serves what it has: redis: {why}" in said
            if why == "READONLY":
                ask(other.port, "REPLICAOF", "NO", "ONE")
            elif why == "NOPERM":
                ask(other.port, "ACL", "SETUSER", "default", "+@all")
            else:
                ask(other.port, "CONFIG", "SET", "stop-writes-on-bgsave-error", "no")
            assert await self.put(tier, 2) == [Lost.REFUSED]
            clock.now += 61
            assert await self.put(tier, 2) == [None]
            await tier.close()

    @staticmethod
    async def cannot_save(other):
        """Until a save has failed: it then takes no writes."""
        ask(other.port, "BGSAVE")
        with anyio.fail_after(20):
            while "bgsave_status:err" not in ask(other.port, "INFO", "persistence"):  # noqa: ASYNC110
                await anyio.sleep(0.05)

    @pytest.mark.anyio
    async def test_a_server_that_evicts_gives_no_wrong_byte(self, ctx, tmp_path, clock, arena):
        with redis("--maxmemory", "3mb", "--maxmemory-policy", "allkeys-random") as small:
            async with self.opened(ctx, tmp_path, clock, url=url_of(small)) as tier:
                object.__setattr__(tier.options, "piece", 10_000)
                whole = 0
                for seed in range(60):
                    assert (await self.put(tier, seed))[0] in (None, Lost.NO_ROOM)
                    got = await self.get(tier, seed // 2)
                    assert got in (Lost.ABSENT, self.bytes_of(arena, seed // 2))
                    whole += isinstance(got, bytes)
                assert whole
                assert tier.counts.extra["torn"]


class TestOthers(RedisBench):
    @pytest.mark.anyio
    async def test_clear_is_of_this_pipeline_only(self, ctx, tmp_path, clock):
        other = TierContext(ctx.arena, b"o" * 32, ctx.pool)
        async with (
            self.opened(ctx, tmp_path, clock) as one,
            self.opened(other, tmp_path, clock) as two,
            self.opened(ctx, tmp_path, clock, prefix="another") as three,
        ):
            ask(self.server.port, "SET", "theirs", "x")
            ask(self.server.port, "SET", "tierloom", "x")
            await self.put(one, *range(40))
            await self.put(three, 1)
            assert await two.exists([key_of(1)]) == [False]
            assert await two.clear() == 0
            assert await one.clear() == 40
            assert len(self.keys()) == 4
            assert isinstance(await self.get(three, 1), bytes)

    @pytest.mark.anyio
    async def test_another_namespace_in_our_place(self, ctx, tmp_path, clock):
        other = TierContext(ctx.arena, b"o" * 32, ctx.pool)
        async with (
            self.opened(ctx, tmp_path, clock) as one,
            self.opened(other, tmp_path, clock) as two,
        ):
            await self.put(one, 1)
            for key in self.keys():
                ask(self.server.port, "COPY", key, key.replace("6e" * 16, "6f" * 16))
            for _ in range(2):  # whole, and somebody's: it stays
                assert await two.exists([key_of(1)]) == [True]
                assert await self.get(two, 1) is Lost.FOREIGN
            assert isinstance(await self.get(one, 1), bytes)

    @pytest.mark.anyio
    async def test_a_lookup_is_one_round_trip(self, ctx, tmp_path, clock):
        """This server answers nothing until it was asked for everything."""
        held = []

        def answer(words):
            if words[0] == b"PING":
                return b"+PONG\r\n"
            held.append(words)
            return b"".join([b":1\r\n", b":0\r\n"] * 32) if len(held) == 64 else b""

        async with Liar(answer) as liar:
            url = f"redis://127.0.0.1:{liar.port}"
            async with self.opened(ctx, tmp_path, clock, url=url) as tier:
                found = await tier.exists([key_of(seed) for seed in range(64)])
                assert found == [True, False] * 32

    @pytest.mark.anyio
    async def test_a_long_read_lets_others_in_between(self, ctx, tmp_path, clock):
        """Layer by layer, the first frames must not wait for another request's last."""
        async with self.opened(ctx, tmp_path, clock, connections=1) as tier:
            object.__setattr__(tier.options, "piece", 4096)
            await self.put(tier, *range(30))
            ended = []

            async def get(*seeds):
                reads = [Read(key_of(seed), ALL) for seed in seeds]
                await tier.read(reads)
                ended.append(len(seeds))
                for read in reads:
                    read.object.lease.release()

            async with anyio.create_task_group() as group:
                group.start_soon(get, *range(1, 30))
                await anyio.lowlevel.checkpoint()
                group.start_soon(get, 0)
            assert ended == [1, 29]

    @pytest.mark.anyio
    async def test_connections_closed_while_idle(self, tier, arena):
        await self.put(tier, *range(4))
        for _ in range(3):
            ask(self.server.port, "CLIENT", "KILL", "TYPE", "normal")
            await anyio.sleep(0.05)
            assert await self.get(tier, 1) == self.bytes_of(arena, 1)

    @pytest.mark.anyio
    async def test_a_user_who_may_only_read(self, ctx, tmp_path, clock, arena):
        reader = ["--user", "reader", "on", ">pw", "~*", "+@read", "+@connection"]
        with redis(*reader) as strict:
            self.server = strict
            async with self.opened(ctx, tmp_path, clock) as tier:
                await self.put(tier, 1, 2)
            for key in self.keys():
                ask(strict.port, "PEXPIRE", key, "40000")
            url = f"redis://reader:pw@127.0.0.1:{strict.port}"
            async with self.opened(ctx, tmp_path, clock, url=url) as tier:
                assert await tier.exists([key_of(1), key_of(3)]) == [True, False]
                assert await self.get(tier, 1) == self.bytes_of(arena, 1)
                with pytest.raises(Refused, match="NOPERM"):
                    await self.put(tier, 3)
                assert await self.get(tier, 2) == self.bytes_of(arena, 2)
