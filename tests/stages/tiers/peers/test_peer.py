"""peer: the contract, against a pipeline in a second process that serves its memory."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
from peer_process import EngineProcess

from tierloom.stages.errors import ConfigError, Lost
from tierloom.stages.tiers.contract.tier import TierContext, TierStat, require_sealed
from tierloom.stages.tiers.peers.options import PeerOptions
from tierloom.stages.tiers.peers.tier import Peer
from tierloom.testing import SIZE, TierContract, key_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tierloom.stages.kv.object import Object
    from tierloom.stages.memory.arena import Arena
    from tierloom.testing import Clock

CONFIG = {
    "version": 1, "budget": {"arena": 64 * SIZE}, "graphs": {}, "serve": {"tiers": ["hot"]},
    "tiers": {"hot": {"use": "memory", "capacity": 256 * SIZE}},
}  # fmt: skip


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    process = EngineProcess(tmp_path_factory.mktemp("other"), CONFIG, bare=True)
    yield process
    assert process.stop() == 0, process.log.read_text()


class Filled(Peer):
    """Puts and deletes for it are done by the engine that it reads from, as it is told."""

    def __init__(self, other: EngineProcess, folder: Path, ctx: TierContext) -> None:
        super().__init__(PeerOptions(directory=[other.url], timeout=20), ctx)
        self._other, self._folder, self._files = other, folder, itertools.count()

    async def open(self) -> None:
        self._other.tell(clear=[])
        await super().open()

    async def put(self, objects: Sequence[Object]) -> list[Lost | None]:
        require_sealed(*objects)
        file = self._folder / str(next(self._files))
        file.write_bytes(b"".join(o.lease.view[: o.header.nbytes] for o in objects))
        sizes = [o.header.nbytes for o in objects]
        codes = self._other.tell(put=[str(file), sizes])
        self.counts.puts += codes.count(0)
        self.counts.bytes_in += sum(sizes)
        return [Lost(code) if code else None for code in codes]

    async def delete(self, keys: Sequence[bytes]) -> int:
        return int(self._other.tell(delete=[[key.hex() for key in keys]]))

    async def clear(self) -> int:
        return int(self._other.tell(clear=[]))

    def stat(self) -> TierStat:
        return TierStat(*self._other.tell(stat=[]))


class TestPeer(TierContract):
    ttl = bounded = False

    @pytest.fixture(params=["asyncio"])
    def anyio_backend(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture(autouse=True)
    def _other(self, other: EngineProcess) -> None:
        self._process = other

    def make(self, ctx: TierContext, folder: Path, clock: Clock, **options: Any) -> Peer:
        return Filled(self._process, folder, ctx)

    @pytest.mark.anyio
    async def test_nothing_is_put_or_deleted(
        self, ctx: TierContext, tmp_path: Path, clock: Clock, arena: Arena
    ) -> None:
        async with self.opened(ctx, tmp_path, clock) as filled:
            await self.put(filled, 1)
            tier = Peer(PeerOptions(directory=[self._process.url]), ctx)
            await tier.open()
            assert await self.put(tier, 2) == [Lost.NO_ROOM]
            assert await tier.clear() == 0
            assert await tier.delete([key_of(1)]) == 0
            assert tier.stat() == (0, 0, 0)
            assert await self.get(tier, 1) == self.bytes_of(arena, 1)
            assert await tier.delete([key_of(1)]) == 0
            assert await tier.exists([key_of(1)]) == [False], "it was of no use"
            assert await filled.exists([key_of(1)]) == [True]
            await tier.close()

    @pytest.mark.anyio
    async def test_a_tier_without_namespace_is_refused(self, arena: Arena, pool: Any) -> None:
        tier = Peer(PeerOptions(directory=["127.0.0.1:1"]), TierContext(arena, b"", pool))
        with pytest.raises(ConfigError, match="namespace"):
            await tier.open()
        await tier.close()


def test_an_address_is_named_once() -> None:
    named = PeerOptions(directory=["a:1, b:2", "tierloom://c:3,a:1"]).addresses
    assert named == ["a:1", "b:2", "tierloom://c:3"]


@pytest.mark.parametrize(
    "options",
    [
        {"directory": []}, {"directory": [" , "]}, {"directory": ["nowhere:port"]}, {"directory": ["http://h:1"]},
        {"directory": ["user:secret@h:1"]}, {"connections": 1}, {"timeout": 0.0}, {"probe": 0.0},
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as error:
        PeerOptions(**({"directory": ["h:1"]} | options))
    assert "secret" not in str(error.value)
