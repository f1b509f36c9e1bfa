"""s3: the contract against real servers; ends, lies and secrets."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from buckets import KEY, NAME, SECRET, Gate, GatedPool, localbucket, moto, rclone
from processes import need

from tierloom.stages.errors import BadObject, ConfigError, Lost, TierDown
from tierloom.stages.tiers.buckets.bucket import S3Options
from tierloom.stages.tiers.buckets.s3 import S3
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.tier import Read, TierContext
from tierloom.testing import ALL, FRAMES, SIZE, Pool, TierContract, key_of, make_object, verify


@pytest.fixture(autouse=True)
def _keys(monkeypatch, tmp_path):
    """Credentials of the environment, and none of this machine's."""
    need("s3", "obstore")
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-keys"))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("localbucket")
    with localbucket(folder) as server:
        yield server, folder / NAME


@pytest.fixture(scope="module")
def aws(tmp_path_factory):
    with moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    with rclone(tmp_path_factory.mktemp("rclone")) as server:
        yield server


class S3Contract(TierContract):
    """`self.url` is made anew for each test, so that tests do not see each other's objects."""

    ttl = bounded = False
    server: str

    @pytest.fixture(params=["asyncio"])  # the client knows no other loop
    def anyio_backend(self, request):
        return request.param

    def make(self, ctx, folder, clock, **options):
        options.pop("capacity", None)
        prefix = f"s3://{NAME}/{folder.name}"
        given = {"url": prefix, "endpoint": self.endpoint, "region": "us-east-1"}
        return S3(S3Options(**(given | options)), ctx)


class TestLocalBucket(S3Contract):
    @pytest.fixture(autouse=True)
    def _server(self, local):
        self.gate = Gate(local[0].port)
        self.endpoint, self.files = self.gate.url, local[1]
        yield
        self.gate.close()

    @pytest.fixture
    def pool(self, _server):
        return GatedPool(self.gate)

    def damage(self, tier, key, change):
        folder = self.files / tier.options.url.rpartition("/")[2]
        (path,) = folder.rglob(f"*{key.hex()}*")
        raw = bytearray(path.read_bytes())
        change(raw)
        path.write_bytes(raw)

    def path_of(self, folder, tier, seed):
        (path,) = (self.files / folder.name).rglob(f"*{key_of(seed).hex()}*")
        return path

    @pytest.mark.anyio
    @pytest.mark.parametrize("part", [256 << 10, 4 << 20])
    async def test_parts_of_any_size(self, ctx, tmp_path, clock, arena, part):
        async with self.opened(ctx, tmp_path, clock, part=part, ranges=3, depth=2) as tier:
            for seed in range(3):
                await self.put(tier, seed, tokens=1024)
            for seed in range(3):
                assert await self.get(tier, seed, 1024) == self.bytes_of(arena, seed, 1024)
            assert tier.counts.bytes_out == tier.counts.bytes_in

    @pytest.mark.anyio
    async def test_layers_of_many_parts(self, ctx, tmp_path, clock, arena):
        async with self.opened(ctx, tmp_path, clock, part=256 << 10) as tier:
            await self.put(tier, 1, tokens=1024)
            read = Read(key_of(1, 1024), 1)
            await tier.read([read])
            held = read.object
            assert (held.loaded, held.sealed) == (1, False)
            for upto in (2, FRAMES):
                await tier.read([Read(read.key, upto, held)])
                assert held.loaded == upto
            assert bytes(held.lease.view[: held.header.nbytes]) == self.bytes_of(arena, 1, 1024)
            held.lease.release()

    @pytest.mark.anyio
    @pytest.mark.parametrize("content", [b"", b"short", b"x" * 4096, b"TLM1" + b"\0" * 8188])
    async def test_foreign_objects(self, tier, tmp_path, content):
        await self.put(tier, 1)
        self.path_of(tmp_path, tier, 1).write_bytes(content)
        assert await self.get(tier, 1) is Lost.CORRUPT
        assert await self.get(tier, 1) is Lost.ABSENT
        assert await self.put(tier, 1) == [None]
        assert isinstance(await self.get(tier, 1), bytes)

    @pytest.mark.anyio
    async def test_two_objects_swapped(self, tier, tmp_path):
        await self.put(tier, 1, 2)
        one, two = (self.path_of(tmp_path, tier, seed) for seed in (1, 2))
        a, b = one.read_bytes(), two.read_bytes()
        one.write_bytes(b)
        two.write_bytes(a)
        assert [await self.get(tier, seed) for seed in (1, 2)] == [Lost.CORRUPT] * 2

    @pytest.mark.anyio
    @pytest.mark.parametrize("change", ["longer", "shorter", "much shorter", "of the same length"])
    async def test_changed_between_two_reads(self, ctx, tmp_path, clock, arena, change):
        async with self.opened(ctx, tmp_path, clock, part=256 << 10) as tier:
            await self.put(tier, 1, tokens=1024)
            read = Read(key_of(1, 1024), 1)
            await tier.read([read])
            path = self.path_of_long(tmp_path)
            raw = path.read_bytes()
            path.write_bytes(
                {
                    "longer": raw + bytes(4096),
                    "shorter": raw[:-4096],
                    "much shorter": raw[:4096],
                    "of the same length": raw[:4096] + bytes(len(raw) - 4096),
                }[change]
            )
            again = Read(read.key, ALL, read.object)
            await tier.read([again])
            if change in ("shorter", "much shorter"):
                assert again.lost is Lost.ABSENT
                assert not read.object.sealed
            elif change == "of the same length":
                with pytest.raises(BadObject, match="frame checksum"):  # which every reader checks
                    verify(read.object, read.key)
            else:  # it begins as the other did, so nothing is wrong
                assert verify(read.object, read.key) == self.bytes_of(arena, 1, 1024)
            read.object.lease.release()

    def path_of_long(self, folder):
        (path,) = (self.files / folder.name).rglob("*.tlm")
        return path

    @pytest.mark.anyio
    @pytest.mark.parametrize("size", ["shorter", "the same length"])
    async def test_changed_within_one_read(self, ctx, tmp_path, clock, arena, size):
        """Another object comes while the parts of the first are on their way."""
        async with self.opened(ctx, tmp_path, clock, part=256 << 10, ranges=1) as tier:
            await self.put(tier, 1, tokens=1024)
            path, right = self.path_of_long(tmp_path), self.bytes_of(arena, 1, 1024)
            get = tier._bucket.get

            async def then_another(*args):
                got = await get(*args)
                path.write_bytes(right[:300_000] if size == "shorter" else right[:-1] + b"!")
                return got

            tier._bucket.get = then_another
            if size == "shorter":
                assert await self.get(tier, 1, 1024) is Lost.ABSENT
            else:
                with pytest.raises(BadObject, match="frame checksum"):  # which every reader checks
                    await self.get(tier, 1, 1024)

    @pytest.mark.anyio
    async def test_answers_that_were_tampered_with(self, tier, arena):
        """On the wire bytes are turned; what comes out is right, or it is a miss."""
        await self.put(tier, 1)
        right = self.bytes_of(arena, 1)
        for turn in (b"TLM1", right[20_000:20_004], b"\r\n\r\n", b"bytes 0-", b"HTTP/1.1 206"):
            self.gate.change = lambda data, turn=turn: data.replace(turn, turn[::-1], 1)
            try:
                got = await self.get(tier, 1)
            except Exception as error:
                got = type(error).__name__
            self.gate.change = None
            assert got in (right, Lost.CORRUPT, Lost.ABSENT, "TierDown", "BadObject"), turn
            await self.put(tier, 1)
        assert await self.get(tier, 1) == right

    @pytest.mark.anyio
    async def test_namespaces_and_prefixes_are_apart(self, ctx, tmp_path, clock):
        other = TierContext(ctx.arena, b"o" * 32, ctx.pool)
        (tmp_path / "other").mkdir()
        async with (
            self.opened(ctx, tmp_path, clock) as one,
            self.opened(other, tmp_path, clock) as two,
            self.opened(ctx, tmp_path / "other", clock) as three,
        ):
            await self.put(one, 1)
            for tier in (two, three):
                assert await tier.exists([key_of(1)]) == [False]
                assert await tier.clear() == 0
            assert await one.exists([key_of(1)]) == [True]

    @pytest.mark.anyio
    @pytest.mark.parametrize("if_absent", [True, False])
    async def test_two_writers(self, ctx, tmp_path, clock, arena, if_absent):
        async with (
            self.opened(ctx, tmp_path, clock, if_absent=if_absent) as one,
            self.opened(ctx, tmp_path, clock, if_absent=if_absent) as two,
        ):
            async with anyio.create_task_group() as group:
                for tier in (one, two):
                    group.start_soon(self.put, tier, *range(8))
            if if_absent:
                assert one.counts.puts + two.counts.puts == 8
            for seed in range(8):
                assert await self.get(one, seed) == self.bytes_of(arena, seed)
            assert await two.delete([key_of(1)]) == 1
            assert await one.exists([key_of(1)]) == [False]

    @pytest.mark.anyio
    async def test_a_put_that_is_given_up_keeps_its_memory_until_the_client_lets_go(
        self, tier, arena
    ):
        obj = make_object(arena, 1, tokens=4096)
        self.gate.open.clear()
        self.gate.reached.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(tier.put, [obj])
            assert await anyio.to_thread.run_sync(self.gate.reached.wait, 30)
            group.cancel_scope.cancel()
        obj.lease.release()  # the caller's
        self.gate.open.set()
        for _ in range(200):
            if not arena.leases:
                break
            await anyio.sleep(0.01)
        assert not arena.leases
        got = await self.get(tier, 1, 4096)  # CORRUPT: this server keeps half a body
        assert got in (Lost.ABSENT, Lost.CORRUPT, self.bytes_of(arena, 1, 4096))

    @pytest.mark.anyio
    async def test_no_bucket(self, ctx, tmp_path, clock):
        tier = self.make(ctx, tmp_path, clock, url="s3://nobody/kv")
        with pytest.raises(ConfigError, match="the bucket does not exist"):
            await tier.open()

    @pytest.mark.anyio
    async def test_a_server_that_is_not_there(self, ctx, tmp_path, clock):
        tier = self.make(ctx, tmp_path, clock, endpoint="http://127.0.0.1:1")
        with pytest.raises(TierDown, match="GET failed"):
            await tier.open()


class TestMoto(S3Contract):
    @pytest.fixture(autouse=True)
    def _server(self, aws):
        self.gate = Gate(aws.port)
        self.endpoint = self.gate.url
        yield
        self.gate.close()

    @pytest.fixture
    def pool(self, _server):
        return GatedPool(self.gate)


class TestFolder(S3Contract):
    """file:// comes with the client."""

    def make(self, ctx, folder, clock, **options):
        options.pop("capacity", None)
        return S3(S3Options(url=f"file://{folder}/kv", **options), ctx)

    def damage(self, tier, key, change):
        (path,) = Path(tier.options.url.removeprefix("file://")).rglob(f"*{key.hex()}*")
        raw = bytearray(path.read_bytes())
        change(raw)
        path.write_bytes(raw)

    @pytest.mark.anyio
    async def test_a_cancelled_put_is_whole_or_invisible(self):
        pytest.skip("nothing between that could be held back")


class Limits:
    timeout, fails, probe = 0.3, 2, 0.2


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.mark.anyio
@pytest.mark.parametrize("end", ["dead", "hung"])
class TestEnds:
    bench = TestLocalBucket()

    async def test_the_breaker_opens_and_closes_again(self, end, tmp_path):
        from tierloom.stages.memory.arena import Arena

        arena = Arena(64 * SIZE, huge_pages=False)
        with localbucket(tmp_path / "data") as server:
            ctx = TierContext(arena, b"n" * 32, Pool())
            options = S3Options(url=f"s3://{NAME}/kv", endpoint=server.url, region="us-east-1")
            bare = S3(options, ctx)
            tier = CircuitBreaker(bare, "cold", Limits())
            await tier.open()
            assert await self.bench.put(bare, 1) == [None]
            with contextlib.ExitStack() as stack:
                if end == "dead":
                    server.stop()
                else:
                    stack.enter_context(server.paused())
                for _ in range(Limits.fails):
                    began = time.monotonic()
                    got = await self.bench.get(tier, 1)
                    assert got in (Lost.TIER_DOWN, Lost.LATE)
                    assert time.monotonic() - began < Limits.timeout + 2  # generous: it is busy
                assert not tier.available
                assert await self.bench.put(tier, 2) == [Lost.TIER_DOWN]
            if end == "dead":
                server.start()
            end_by = time.monotonic() + 10
            while (got := await self.bench.get(tier, 1)) in (Lost.TIER_DOWN, Lost.LATE):
                assert time.monotonic() < end_by, "it never came back"
                await anyio.sleep(0.02)
            assert tier.available
            assert isinstance(got, bytes)
            await tier.close()
        for _ in range(200):
            if not arena.leases:
                break
            await anyio.sleep(0.01)
        assert not arena.leases
        arena.close()


@pytest.mark.anyio
class TestSecrets:
    @pytest.fixture
    def ctx(self):
        from tierloom.stages.memory.arena import Arena

        arena = Arena(8 * SIZE, huge_pages=False)
        yield TierContext(arena, b"n" * 32, Pool())
        assert not arena.leases
        arena.close()

    def tier(self, ctx, server, **options):
        given = {"url": f"s3://{NAME}/kv", "endpoint": server.url, "region": "us-east-1"}
        return S3(S3Options(**(given | options)), ctx)

    @pytest.mark.parametrize("unsigned", [True, False, "auto"])
    async def test_right_keys_are_taken(self, ctx, strict, unsigned):
        tier = self.tier(ctx, strict, unsigned=unsigned, url=f"s3://{NAME}/{unsigned}")
        await tier.open()
        bench = TestLocalBucket()
        assert await bench.put(tier, 1) == [None]
        assert await tier.exists([key_of(1), key_of(2)]) == [True, False]
        assert await tier.clear() == 1

    async def test_wrong_keys_are_refused_and_not_told(self, ctx, strict, monkeypatch, caplog):
        secret = "wrongsecretwrongsecret"
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        caplog.set_level(logging.DEBUG)
        tier = CircuitBreaker(self.tier(ctx, strict), "cold", Limits())
        with pytest.raises(ConfigError, match=r"refused \(PermissionDeniedError, 403 Forbidden"):
            await tier.open()
        with pytest.raises(ConfigError) as caught:
            await tier.open()
        assert await tier.exists([key_of(1)]) == [False]
        told = f"{caught.value!r} {caplog.text} {tier.tier!r} {vars(tier.tier)}"
        assert secret not in told
        assert KEY not in told

    @pytest.mark.parametrize(("status", "code"), [("403 F", Lost.REFUSED), ("507 I", Lost.NO_ROOM)])
    async def test_a_bucket_that_refuses_puts_is_read(self, ctx, local, monkeypatch, status, code):
        tier = CircuitBreaker(self.tier(ctx, local[0]), "cold", Limits())
        await tier.open()
        bench = TestLocalBucket()
        assert await bench.put(tier, 1) == [None]
        obs = tier.tier._bucket._obs
        kind = obs.exceptions.PermissionDeniedError if "403" in status else OSError

        async def refuse(*_, **__):
            raise kind(f"Server returned non-2xx status code: {status}: ")

        monkeypatch.setattr(obs, "put_async", refuse)
        for _ in range(4):
            assert await bench.put(tier, 2) == [code]
        assert tier.available
        assert isinstance(await bench.get(tier, 1), bytes)
        await tier.clear()
        await tier.close()

    async def test_a_profile(self, ctx, strict, monkeypatch, tmp_path):
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        keys, config = tmp_path / "aws-keys", tmp_path / "aws-config"
        config.write_text(
            f"[default]\nregion = nowhere\n[profile kv]\nregion = us-east-1\ns3 =\n"
            f"  addressing_style = path\naws_access_key_id = {KEY}\n"
            f"aws_secret_access_key = of%another\n[profile role]\nrole_arn = arn:x\n"
        )
        keys.write_text(f"[kv]\naws_secret_access_key = {SECRET}\n")
        for chosen in ("option", "environment", "default"):
            if chosen == "environment":
                monkeypatch.setenv("AWS_PROFILE", "kv")
            if chosen == "default":
                monkeypatch.delenv("AWS_PROFILE")
                keys.write_text(
                    f"[default]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n"
                )
            tier = self.tier(ctx, strict, profile="kv" if chosen == "option" else "", region="")
            await tier.open()
            assert await tier.exists([key_of(1)]) == [False]
            assert SECRET not in repr(tier._bucket._settings())
        for name in ("role", "nobody"):
            with pytest.raises(ConfigError, match=f"--profile {name} --format env"):
                await self.tier(ctx, strict, profile=name).open()
        keys.write_text(f"{SECRET}\n[kv")
        with pytest.raises(ConfigError, match="not a valid file of AWS profiles") as caught:
            await self.tier(ctx, strict, profile="kv").open()
        assert SECRET not in str(caught.value)

    async def test_the_client_is_not_installed(self, ctx, strict, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "obstore", None)
        with pytest.raises(ConfigError, match=r"pip install 'tierloom\[s3\]'"):
            await self.tier(ctx, strict).open()


def test_explaining_tells_no_credentials(monkeypatch):
    from tierloom.pipeline.config import explain
    from tierloom.pipeline.config.load import load_config

    monkeypatch.setenv("TIERLOOM_S3_ENDPOINT", "http://127.0.0.1:9")
    told = explain.explain(load_config("s3"))
    assert "http://127.0.0.1:9" in told
    assert KEY not in told
    assert SECRET not in told


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"url": ""}, "must begin with one of"),
        ({"url": "ftp://x"}, "must begin with one of"),
        ({"url": "s3:///x"}, "names no bucket"),
        ({"url": "s3://key:secret@bucket/x"}, "must not contain credentials"),
        ({"url": "az://c/p?sv=1&sig=secret"}, "must not contain credentials"),
        ({"endpoint": "http://key:secret@host"}, "must not contain credentials"),
        ({"endpoint": "host:9000"}, "must begin with http"),
        ({"url": "gs://bucket", "endpoint": "http://x"}, "not supported for gs"),
        ({"unsigned": "maybe"}, "known: true, false, auto"),
        ({"part": 4096}, "at least 262144"),
        ({"ranges": 0}, "at least 1"),
        ({"retries": -1}, "retries at least 0"),
    ],
    ids=str,
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match) as caught:
        S3Options(**({"url": "s3://bucket"} | options))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["gs://bucket/kv", "az://container/kv"])
def test_other_clouds_are_addressed(url, monkeypatch):
    """What can be shown without their servers: the client takes what we tell it."""
    from obstore.store import from_url

    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    from tierloom.stages.memory.arena import Arena

    tier = S3(S3Options(url=url), TierContext(Arena(4096), b"n" * 32, Pool()))
    assert from_url(url, **tier._bucket._settings()).prefix == "kv"
