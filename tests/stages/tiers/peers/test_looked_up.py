"""Who has what, as a directory says: one that fails is asked by one call in a second."""

from __future__ import annotations

import hashlib

import pytest

from tierloom.stages.directory.shared.embedded import EmbeddedDirectory
from tierloom.stages.directory.shared.records import WorkerRecord, chunk_name, pack_changes
from tierloom.stages.errors import TierDown
from tierloom.stages.tiers.peers import looked_up
from tierloom.stages.tiers.peers.looked_up import LookedUp
from tierloom.stages.tiers.peers.options import PeerOptions

pytestmark = pytest.mark.anyio
SPACE = b"s" * 32
KEYS = [hashlib.sha256(bytes([i])).digest() for i in range(8)]


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Down(EmbeddedDirectory):
    """It counts searches, and fails where it is told to."""

    def __init__(self):
        super().__init__()
        self.finds, self.down = 0, False

    async def find(self, names):
        self.finds += 1
        if self.down:
            raise TierDown("it is down")
        return await super().find(names)


async def test_one_that_fails_is_left_alone(monkeypatch, caplog) -> None:
    directory = Down()
    record = WorkerRecord(
        instance="a", process="0" * 32, tiers=("hot",), addresses=("h:1",), heartbeat=60.0
    )
    epoch = await directory.join(record)
    held = pack_changes((chunk_name(SPACE, key), 1) for key in KEYS[:6])
    assert await directory.announce(epoch, 1, held)
    known, right = LookedUp(directory, SPACE), [["h:1"]] * 6 + [[]] * 2
    assert await known.holders(KEYS) == right
    directory.down = True
    for _ in range(20):
        assert await known.holders(KEYS) == [[]] * 8
    assert directory.finds == 2
    directory.down = False
    assert await known.holders(KEYS) == [[]] * 8
    monkeypatch.setattr(looked_up, "_REST", 0.0)
    known._retry = 0.0
    for _ in range(3):
        assert await known.holders(KEYS) == right
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2
    await known.close()


@pytest.mark.parametrize("one", ["redis-sentinel://h1,h2/kv", "directory://h:1", "rediss://h"])
async def test_what_is_a_directory_and_what_an_engine(one) -> None:
    assert PeerOptions(directory=[one]).looks_up
    assert not PeerOptions(directory=["redis5:7655, directory:7655"]).looks_up
    with pytest.raises(ValueError, match="one directory, or engines"):
        PeerOptions(directory=[one, "10.0.0.2:1"])
    with pytest.raises(ValueError, match="name who hosts it"):
        PeerOptions(directory=["embedded"])
