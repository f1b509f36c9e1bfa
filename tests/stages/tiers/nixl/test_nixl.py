"""nixl: the contracts of files, segments and buckets, with a plugin that moves the bytes."""

from __future__ import annotations

import os
import resource

import anyio
import anyio.to_thread
import pytest
from buckets import KEY, NAME, SECRET, Gate, localbucket
from processes import need

from tierloom.stages.errors import ConfigError, Lost, TierDown
from tierloom.stages.tiers.buckets.s3 import object_name
from tierloom.stages.tiers.contract.tier import TierContext
from tierloom.stages.tiers.nixl.agent import NixlFileIO
from tierloom.stages.tiers.nixl.tier import Nixl, NixlOptions
from tierloom.testing import NAMESPACE, SIZE, TierBench, TierContract, key_of


@pytest.fixture(autouse=True)
def _client(monkeypatch):
    need("nixl", "nixl_cu12")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    # All but headers goes by NIXL, also of the small objects that contracts are tested with.
    monkeypatch.setattr("tierloom.stages.tiers.nixl.agent._SMALL", 4096)


class TestPosixFiles(TierContract):
    io = "aio"

    def make(self, ctx, folder, clock, **options):
        return Nixl(NixlOptions(path=str(folder / "kv"), io=self.io, **options), ctx, clock=clock)

    def damage(self, tier, key, change):
        path = tier.tier._path(key)
        raw = bytearray(path.read_bytes())
        change(raw)
        path.write_bytes(raw)

    @pytest.mark.anyio
    async def test_the_plugin_moves_the_frames(self, ctx, tmp_path, clock, arena, monkeypatch):
        """Objects of a hundred KiB and more go by NIXL, in both directions."""
        moved = []
        go = NixlFileIO._go

        def noted(self, verb, fd, view, at):
            moved.append((verb, len(view)))
            return go(self, verb, fd, view, at)

        monkeypatch.setattr(NixlFileIO, "_go", noted)
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, 1, tokens=1024)
            assert await self.get(tier, 1, 1024) == self.bytes_of(arena, 1, 1024)
        nbytes = 4096 + 3 * 16 * 16384
        assert moved == [("WRITE", nbytes), ("READ", nbytes - 4096)]

    @pytest.mark.anyio
    async def test_no_descriptor_is_left_open(self, tier, arena):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            await self.put(tier, *range(8))
            for seed in range(8):
                await self.get(tier, seed)
            await tier.clear()
        assert len(os.listdir("/proc/self/fd")) == before

    @pytest.mark.anyio
    async def test_a_disk_that_is_full(self, ctx, tmp_path, clock):
        """A file may be no longer than half an object: nothing is seen of it, and it is no room."""
        async with self.opened(ctx, tmp_path, clock) as tier:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, hard))
            try:
                assert await self.put(tier, 1) == [Lost.NO_ROOM]
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert await tier.exists([key_of(1)]) == [False]
            assert not list(tmp_path.rglob("*.tmp"))
            assert await self.put(tier, 1) == [None]

    @pytest.mark.anyio
    async def test_buffered(self, ctx, tmp_path, clock, arena):
        async with self.opened(ctx, tmp_path, clock, direct=False) as tier:
            await self.put(tier, 1, tokens=1024)
            assert await self.get(tier, 1, 1024) == self.bytes_of(arena, 1, 1024)


class TestPosixUring(TestPosixFiles):
    io = "uring"

    @pytest.fixture(autouse=True)
    def _allowed(self, arena):
        file_io = NixlFileIO("POSIX", {"use_uring": "true"}, arena)
        try:
            file_io.start()
        except ConfigError:
            pytest.skip("this kernel does not let us use io_uring")
        file_io.stop()


class TestPosixSegments(TierContract):
    """A static pool: the segments' descriptors are registered once."""

    local = True

    def make(self, ctx, folder, clock, **options):
        options.setdefault("capacity", 64 * SIZE)
        made = NixlOptions(path=str(folder / "kv"), pool="static", **options)
        return Nixl(made, ctx, clock=clock)

    @pytest.mark.anyio
    async def test_a_restart(self, ctx, tmp_path, clock, arena):
        async with self.opened(ctx, tmp_path, clock) as tier:
            await self.put(tier, 1, 2)
        async with self.opened(ctx, tmp_path, clock) as tier:
            assert await self.get(tier, 2) == self.bytes_of(arena, 2)


class TestObjects(TierContract):
    ttl = bounded = False

    @pytest.fixture(params=["asyncio"])
    def anyio_backend(self, request):
        return request.param

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("objects")
        with localbucket(folder) as server:
            yield server, folder / NAME

    @pytest.fixture(autouse=True)
    def _server(self, server, monkeypatch):
        need("s3", "obstore")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        self.gate = Gate(server[0].port)
        self.files = server[1]
        yield
        self.gate.close()

    @pytest.fixture
    def pool(self, _server):
        from buckets import GatedPool

        return GatedPool(self.gate)

    def make(self, ctx, folder, clock, **options):
        options.pop("capacity", None)
        given = {"url": f"s3://{NAME}/{folder.name}", "endpoint": self.gate.url}
        return Nixl(
            NixlOptions(backend="OBJ", region="us-east-1", **(given | options)), ctx, clock=clock
        )

    def damage(self, tier, key, change):
        (path,) = (self.files / tier.options.url.rpartition("/")[2]).rglob(f"{object_name(key)}*")
        raw = bytearray(path.read_bytes())
        change(raw)
        path.write_bytes(raw)

    @pytest.mark.anyio
    async def test_what_obstore_put_nixl_reads_in_place(self, tier, arena):
        await self.put(tier, 1, tokens=1024)
        assert await self.get(tier, 1, 1024) == self.bytes_of(arena, 1, 1024)

    @pytest.mark.anyio
    async def test_a_read_that_is_given_up_keeps_its_lease_until_it_is_through(self, tier, arena):
        await self.put(tier, 1, tokens=1024)
        size, held = tier.tier._bucket.size, []

        async def then_shut(name):
            found = await size(name)
            self.gate.open.clear()
            self.gate.reached.clear()
            asking.set()
            return found

        asking, tier.tier._bucket.size = anyio.Event(), then_shut
        async with anyio.create_task_group() as group:
            group.start_soon(self.get, tier, 1, 1024)
            await asking.wait()
            assert await anyio.to_thread.run_sync(self.gate.reached.wait, 30)
            group.cancel_scope.cancel()
        tier.tier._bucket.size = size
        held = arena.leases
        assert held == 1, "NIXL may still write into it"
        self.gate.open.set()
        for _ in range(300):
            if not arena.leases:
                break
            await anyio.sleep(0.01)
        assert not arena.leases
        assert await self.get(tier, 1, 1024) == self.bytes_of(arena, 1, 1024)

    @pytest.mark.anyio
    async def test_gone_between_size_and_read(self, tier, tmp_path):
        await self.put(tier, 1)
        size, asked = tier.tier._bucket.size, []

        async def then_gone(name):
            found = await size(name)
            if not asked:
                (path,) = (self.files / tmp_path.name).rglob("*.tlm")
                path.unlink()
            asked.append(name)
            return found

        tier.tier._bucket.size = then_gone
        assert await self.get(tier, 1) is Lost.ABSENT


class TestPlugins(TierBench):
    @pytest.fixture(params=["asyncio"])
    def anyio_backend(self, request):
        return request.param

    def make(self, ctx, folder, clock, **options):
        return Nixl(NixlOptions(path=str(folder / "kv"), **options), ctx)

    @pytest.mark.anyio
    @pytest.mark.parametrize(
        ("backend", "cause"),
        [
            ("GDS", r"GDS cannot be loaded: libcu\w+\.so"),
            ("GDS_MT", r"GDS_MT cannot be loaded: libcu\w+\.so"),
            ("HF3FS", r"does not find plugin HF3FS; it has .*POSIX.*NIXL_PLUGIN_DIR"),
        ],
    )
    async def test_a_plugin_that_is_missing(self, ctx, tmp_path, clock, backend, cause):
        with pytest.raises(ConfigError, match=cause):
            await self.make(ctx, tmp_path, clock, backend=backend).open()

    @pytest.mark.anyio
    async def test_a_plugin_that_does_not_start(self, arena):
        file_io = NixlFileIO("POSIX", {"use_aio": "true", "ios_pool_size": "many"}, arena)
        with pytest.raises(ConfigError, match="POSIX cannot start"):
            file_io.start()

    @pytest.mark.anyio
    async def test_the_client_is_not_installed(self, ctx, tmp_path, clock, monkeypatch):
        import sys

        for name in ("nixl", "nixl_cu13", "nixl_cu12"):
            monkeypatch.setitem(sys.modules, name, None)
            monkeypatch.setitem(sys.modules, f"{name}._api", None)
        with pytest.raises(ConfigError, match=r"pip install 'tierloom\[nixl\]'"):
            await self.make(ctx, tmp_path, clock).open()

    @pytest.mark.anyio
    async def test_a_transfer_that_fails_is_the_tiers_failure(self, ctx, tmp_path, clock, arena):
        """Past the end of a file: told in words, and the next one goes well."""
        file_io = NixlFileIO("POSIX", {"use_aio": "true"}, arena)
        file_io.start()
        path = tmp_path / "short"
        path.write_bytes(bytes(256 << 10))
        lease = arena.lease(512 << 10)
        fd = file_io.open(path, os.O_RDWR)
        with pytest.raises(TierDown, match="NIXL POSIX: transfer failed: nixlBackendError"):
            file_io.read(fd, lease.view, 0)
        file_io.read(fd, lease.view[: 256 << 10], 0)
        file_io.close(fd)
        file_io.stop()
        lease.release()

    @pytest.mark.anyio
    async def test_stopped_under_a_thread(self, ctx, tmp_path, clock, arena):
        """What is at a file still when the tier is closed ends as it would have."""
        file_io = NixlFileIO("POSIX", {"use_aio": "true"}, arena)
        file_io.start()
        lease = arena.lease(512 << 10)
        fd = file_io.open(tmp_path / "late", os.O_RDWR | os.O_CREAT)
        transfer = file_io._agent.begin("WRITE", [(0, 512 << 10, fd)], "FILE", lease.address)
        file_io.stop()
        while not transfer.done():  # noqa: ASYNC110
            await anyio.sleep(0.001)
        file_io.close(fd)
        assert (tmp_path / "late").read_bytes() == lease.view
        lease.release()

    @pytest.mark.anyio
    async def test_two_tiers_over_one_arena(self, ctx, tmp_path, clock, arena):
        other = TierContext(arena, NAMESPACE, ctx.pool)
        (tmp_path / "b").mkdir()
        async with (
            self.opened(ctx, tmp_path, clock) as one,
            self.opened(other, tmp_path / "b", clock) as two,
        ):
            for tier in (one, two):
                await self.put(tier, 1, tokens=1024)
            assert await self.get(one, 1, 1024) == await self.get(two, 1, 1024)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "POSIX needs a path"),
        ({"backend": "posix"}, "known: POSIX, GDS"),
        ({"path": "/x", "url": "s3://x"}, "neither url"),
        ({"backend": "OBJ", "url": "az://x"}, "needs a url with s3"),
        ({"backend": "OBJ", "url": "s3://x", "capacity": 5}, "not supported for a bucket"),
        ({"backend": "OBJ", "url": "s3://a:secret@x"}, "must not contain credentials"),
        ({"backend": "AZURE_BLOB", "path": "/x"}, "needs a url with az"),
        ({"path": "/x", "pool": "static"}, "wants a capacity|needs a capacity"),
        ({"path": "/x", "pool": "some"}, "dynamic or static"),
        ({"path": "/x", "io": "sync"}, "aio, uring or posix_aio"),
        ({"path": "/x", "direct": "maybe"}, "known: true, false, auto"),
        ({"path": "/x", "depth": 0}, "at least 1"),
    ],
    ids=str,
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        NixlOptions(**options)
