"""server: the contract, against a real `tierloom serve`: TCP, a unix socket, shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from store_server import Process, process

from tierloom.stages.errors import ConfigError, Lost
from tierloom.stages.kv.object import name_of
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.tier import Tier, TierContext
from tierloom.stages.tiers.server.tier import Server, ServerOptions
from tierloom.testing import NAMESPACE, SIZE, TierBench, TierContract, key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tierloom.testing import Clock


class Servers:
    """Processes by their capacity, each started once and emptied before it is used."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: dict[int, Process] = {}

    def with_capacity(self, nbytes: int) -> Process:
        if nbytes not in self._started:
            folder = self._folder / str(nbytes)
            self._started[nbytes] = Process(
                folder, tiers={"hot": {"use": "memory", "capacity": nbytes}},
                listen=("tcp://127.0.0.1:0", f"unix://{folder}/socket"),
            )  # fmt: skip
        return self._started[nbytes]

    def close(self) -> None:
        for server in self._started.values():
            assert server.stop() == 0, server.log.read_text()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    made = Servers(tmp_path_factory.mktemp("servers"))
    yield made
    made.close()


class ServerContract(TierContract):
    ttl = False
    which = 0
    share = False

    @pytest.fixture(autouse=True)
    def _servers(self, servers: Servers) -> None:
        self._made = servers

    def make(self, ctx: TierContext, folder: Path, clock: Clock, **options: Any) -> Server:
        server = self._made.with_capacity(options.pop("capacity", 64 * SIZE))
        url = server.urls[self.which]
        return Server(ServerOptions(url=url, share=self.share, **options), ctx)

    def opened(self, *args: Any, **options: Any) -> Any:
        return _emptied(super().opened(*args, **options))


class _emptied:
    """A tier in which earlier tests left nothing."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened

    async def __aenter__(self) -> Tier:
        tier = await self._opened.__aenter__()
        await tier.clear()
        return tier

    async def __aexit__(self, *error: Any) -> Any:
        return await self._opened.__aexit__(*error)


class TestTcp(ServerContract):
    @pytest.mark.anyio
    async def test_namespaces_are_apart(
        self, ctx: TierContext, tmp_path: Path, clock: Clock, arena: Arena
    ) -> None:
        """One key, two namespaces, other bytes: nobody sees, drops or counts the other's."""
        other = TierContext(arena, b"o" * 32, ctx.pool)
        async with (
            self.opened(ctx, tmp_path, clock) as one,
            self.opened(other, tmp_path, clock) as two,
        ):
            await self.put(one, 1, 2)
            assert await two.exists([key_of(1)]) == [False]
            assert await self.get(two, 1) is Lost.ABSENT
            assert await two.delete([key_of(1)]) == 0
            assert await two.clear() == 0
            assert two.stat()[:2] == (0, 0)
            assert await self.put(two, 1) == [Lost.CORRUPT], "an object of another's namespace"
            assert await self.get(one, 1) == self.bytes_of(arena, 1)

    @pytest.mark.anyio
    async def test_a_prompts_tail_goes_first(
        self, ctx: TierContext, tmp_path: Path, clock: Clock
    ) -> None:
        """Put in two calls, and settled: the last chunk makes room, not the first."""
        async with self.opened(ctx, tmp_path, clock, capacity=4 * SIZE) as tier:
            await self.put(tier, 1, 2)
            await self.put(tier, 3, 4)
            tier.order_for_eviction([key_of(3), key_of(4)])
            tier.order_for_eviction([key_of(1), key_of(2)])
            for new, left in ((5, [1, 2, 3]), (6, [1, 2])):
                await self.put(tier, new)
                for seed in left:
                    assert isinstance(await self.get(tier, seed), bytes)
                tier.order_for_eviction([key_of(seed) for seed in left])
            assert await self.get(tier, 4) is Lost.ABSENT

    @pytest.mark.anyio
    async def test_a_tier_without_namespace_is_refused(self, arena, tmp_path, clock, pool) -> None:
        with pytest.raises(ConfigError, match="namespace"):
            await self.make(TierContext(arena, b"", pool), tmp_path, clock).open()


class TestUnix(ServerContract):
    which = 1


class TestSharedMemory(ServerContract):
    which = 1
    share = True

    @pytest.mark.anyio
    async def test_no_room_in_the_arena(self, tier: Tier, arena: Arena) -> None:
        """What is lent needs none."""
        await self.put(tier, 1)
        held = arena.lease(arena.working)
        got = await self.get(tier, 1)
        held.release()
        assert got == self.bytes_of(arena, 1)


class DamageOnDisk(TierBench):
    """The contract's damage, done to the files that a server keeps."""

    which = 0
    test_damage_is_a_miss = TierContract.test_damage_is_a_miss
    test_swapped_objects_are_misses = TierContract.test_swapped_objects_are_misses

    @pytest.fixture(autouse=True)
    def _server(self, tmp_path: Path) -> Iterator[None]:
        self._files = tmp_path / "kv"
        tiers = {"cold": {"use": "files", "path": str(self._files)}}
        listen = ("tcp://127.0.0.1:0", f"unix://{tmp_path}/socket")
        with process(tmp_path, tiers=tiers, listen=listen) as server:
            self._url = server.urls[self.which]
            yield

    def make(self, ctx: TierContext, folder: Path, clock: Clock, **options: Any) -> Server:
        return Server(ServerOptions(url=self._url, **options), ctx)

    def damage(self, tier: Tier, key: bytes, change: Callable[[bytearray], None]) -> None:
        name = name_of(NAMESPACE, key).hex()
        file = self._files / "any" / name[:2] / f"{name}.tlm"
        raw = bytearray(file.read_bytes())
        change(raw)
        file.write_bytes(raw)


class TestDamageTcp(DamageOnDisk):
    pass


class TestDamageUnix(DamageOnDisk):
    which = 1


@pytest.mark.parametrize(
    "options",
    [
        {"url": ""}, {"url": "redis://h:1"}, {"url": "tierloom://"}, {"url": "tierloom://h:99999"},
        {"url": "tierloom+unix://host/path"}, {"url": "tierloom://user:secret@h:1"},
        {"url": "tierloom://h/path"}, {"connections": 0},
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as error:
        ServerOptions(**({"url": "tierloom://h:1"} | options))
    assert "secret" not in str(error.value)
