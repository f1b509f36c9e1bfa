"""What every directory promises, as tests: subclass `DirectoryContract`, say how one is made."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tierloom.stages.directory.shared.contract import Directory
from tierloom.stages.directory.shared.records import (
    MOST_HOLDERS,
    MOST_NAMES,
    NUMBERS,
    ChunkHolder,
    WorkerRecord,
    chunk_name,
    number_of,
    pack_changes,
    turn_of,
)
from tierloom.stages.errors import ConfigError, InputError

SPACE = b"s" * 32


def names_of(seed: int, count: int) -> list[bytes]:
    """Names of the chunks of prompt `seed`."""
    keys = [hashlib.sha256(b"%d/%d" % (seed, i)).digest() for i in range(count)]
    return [chunk_name(SPACE, key) for key in keys]


def worker_of(instance: str, process: int = 1, **fields: Any) -> WorkerRecord:
    """A worker with two tiers."""
    said: dict[str, Any] = {"tiers": ("hot", "warm"), "heartbeat": 5.0}
    return WorkerRecord(instance=instance, process=f"{process:032x}", **(said | fields))


def held(names: list[bytes], tiers: int = 1) -> bytes:
    return pack_changes((name, tiers) for name in names)


class DirectoryContract:
    """Three methods say how a directory is made, emptied, and how its time passes."""

    pytestmark = pytest.mark.anyio

    async def make(self) -> Directory:
        raise NotImplementedError

    async def empty(self, directory: Directory) -> Directory:
        """It has lost everything; what its clients use then."""
        raise NotImplementedError

    async def wait(self, seconds: float) -> None:
        raise NotImplementedError

    async def size(self, directory: Directory) -> int:
        """Chunks of which anything is kept."""
        raise NotImplementedError

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    @pytest.fixture
    async def directory(self) -> AsyncIterator[Directory]:
        directory = await self.make()
        yield directory
        await directory.close()

    async def test_the_longest_prefix_with_its_holders(self, directory: Directory) -> None:
        a, b = await directory.join(worker_of("a")), await directory.join(worker_of("b"))
        names = names_of(1, 64)
        assert await directory.find(names) == []
        assert await directory.announce(a, 1, held(names[:40]))
        assert await directory.announce(b, 1, held(names[:20], 2) + held(names[50:], 3))
        found = await directory.find(names)
        assert len(found) == 40
        one, other = ChunkHolder(number_of(a), 1), ChunkHolder(number_of(b), 2)
        assert [set(holders) for holders in found] == [{one, other}] * 20 + [{one}] * 20
        assert await directory.find(names[20:]) == found[20:]
        assert await directory.find([]) == []
        assert await directory.find(names_of(2, 64)) == []

    async def test_a_hole_ends_the_prefix(self, directory: Directory) -> None:
        a, names = await directory.join(worker_of("a")), names_of(1, 40)
        assert await directory.announce(a, 1, held(names))
        assert await directory.withdraw(a, 2, [names[17]])
        assert len(await directory.find(names)) == 17
        assert len(await directory.find(names[18:])) == 22

    async def test_tiers_come_and_go(self, directory: Directory) -> None:
        a, names = await directory.join(worker_of("a")), names_of(1, 1)
        for sequence, tiers in enumerate((1, 3, 2, 2, 8, 15), 1):
            assert await directory.announce(a, sequence, held(names, tiers))
            assert await directory.find(names) == [(ChunkHolder(number_of(a), tiers),)]
        assert await directory.withdraw(a, 7, names)
        assert await directory.withdraw(a, 8, names)
        assert await directory.find(names) == []
        assert await self.size(directory) == 0

    async def test_the_last_word_of_a_call_counts(self, directory: Directory) -> None:
        a, (name,) = await directory.join(worker_of("a")), names_of(1, 1)
        assert await directory.announce(a, 1, held([name], 3) + held([name], 0))
        assert await directory.announce(a, 2, b"".join(held([name], n) for n in (1, 3, 1)))
        assert await directory.find([name]) == [(ChunkHolder(number_of(a), 1),)]
        assert await directory.announce(a, 3, held([name], 0) * 2)
        assert await directory.find([name]) == []

    async def test_wrong_input_is_named(self, directory: Directory) -> None:
        a, names = await directory.join(worker_of("a")), names_of(1, 1)
        with pytest.raises(InputError, match="name 1 of a chunk has 15 bytes, not 16"):
            await directory.find([*names, names[0][:15]])
        with pytest.raises(InputError, match=f"{MOST_NAMES} at most"):
            await directory.find(names * (MOST_NAMES + 1))
        with pytest.raises(InputError, match="tiers that no worker has"):
            await directory.announce(a, 1, held(names, 16))
        with pytest.raises(InputError, match="changes of 17425 bytes: 1024 of 17 at most"):
            await directory.announce(a, 1, held(names * 1025))
        with pytest.raises(InputError, match="0 bytes, not 16"):
            await directory.report(b"", ChunkHolder(1, 1))
        assert await directory.find(names) == []
        assert await directory.beat(a, 0)

    async def test_a_gap_is_told(self, directory: Directory) -> None:
        a, names = await directory.join(worker_of("a")), names_of(1, 4)
        assert await directory.announce(a, 1, held(names[:1]))
        assert not await directory.announce(a, 3, held(names[:2]))
        assert not await directory.beat(a, 2)
        assert await directory.beat(a, 1)
        assert len(await directory.find(names)) == 1
        assert await directory.announce(a, 2, held(names[:3]))
        assert await directory.beat(a, 1), "the answer to 2 was lost"
        assert not await directory.announce(a, 1, held(names))
        assert len(await directory.find(names)) == 3

    async def test_made_again_it_is_done_once(self, directory: Directory) -> None:
        a, names = await directory.join(worker_of("a")), names_of(1, 2)
        for _ in range(2):
            assert await directory.announce(a, 1, held(names))
        assert await directory.withdraw(a, 2, names)
        assert not await directory.announce(a, 1, held(names))
        assert await directory.find(names) == []

    async def test_who_is_silent_is_dead_at_once(self, directory: Directory) -> None:
        a = await directory.join(worker_of("a", heartbeat=0.6))
        b = await directory.join(worker_of("b"))
        names = names_of(1, 4)
        assert await directory.announce(a, 1, held(names))
        assert await directory.announce(b, 1, held(names[:2]))
        for _ in range(14):
            await self.wait(0.1)
            assert await directory.beat(b, 1)
        assert await directory.find(names) == [(ChunkHolder(number_of(b), 1),)] * 2
        assert set(await directory.workers()) == {number_of(b)}
        assert not await directory.beat(a, 1)
        assert not await directory.announce(a, 2, held(names))
        again = await directory.join(worker_of("a"), first=a, last=a)
        assert again > b > a
        assert await directory.find(names) == [(ChunkHolder(number_of(b), 1),)] * 2
        assert await directory.announce(again, 1, held(names))
        assert len(await directory.find(names)) == 4
        assert {h.number for h in (await directory.find(names))[0]} == {
            number_of(again), number_of(b),
        }  # fmt: skip

    async def test_who_leaves(self, directory: Directory) -> None:
        a, names = await directory.join(worker_of("a")), names_of(1, 3)
        assert await directory.announce(a, 1, held(names))
        await directory.leave(a)
        await directory.leave(a)
        assert await directory.find(names) == []
        assert await directory.workers() == {}
        assert not await directory.beat(a, 1)

    async def test_a_restarted_worker_takes_its_name(self, directory: Directory) -> None:
        """Of what the process before it held, nothing is found; that one, if it lives, is told."""
        old, names = await directory.join(worker_of("a", 1)), names_of(1, 3)
        assert await directory.announce(old, 1, held(names))
        new = await directory.join(worker_of("a", 2))
        assert new > old
        assert await directory.find(names) == []
        assert not await directory.announce(old, 2, held(names))
        assert not await directory.beat(old, 1)
        with pytest.raises(ConfigError, match=r"'a/0'.*`instance` of its own"):
            await directory.join(worker_of("a", 1), first=old, last=old)
        assert await directory.beat(new, 0)
        other = await directory.join(worker_of("a", 1, rank=1))
        assert {m.record.name for m in (await directory.workers()).values()} == {"a/0", "a/1"}
        assert (await directory.workers([number_of(other)])).keys() == {number_of(other)}

    async def test_two_with_one_name_after_all_was_lost(self, directory: Directory) -> None:
        old = await directory.join(worker_of("a", 1))
        new = await directory.join(worker_of("a", 2))
        directory = await self.empty(directory)
        again = await directory.join(worker_of("a", 1), first=old, last=old)
        assert again > old
        latest = await directory.join(worker_of("a", 2), first=new, last=new)
        assert latest > max(again, new)
        with pytest.raises(ConfigError):
            await directory.join(worker_of("a", 1), first=old, last=again)
        assert await directory.beat(latest, 0)

    async def test_epochs_only_grow_and_numbers_are_of_one(self, directory: Directory) -> None:
        a = await directory.join(worker_of("a"))
        last = a + (NUMBERS - 1 << 20)
        b = await directory.join(worker_of("b"), first=last, last=last)
        assert turn_of(b) == turn_of(a) + NUMBERS + 1, "the number of a is taken"
        assert set(await directory.workers()) == {number_of(a), number_of(b)}
        assert await directory.join(worker_of("c")) > b

    async def test_emptied(self, directory: Directory) -> None:
        a, names = await directory.join(worker_of("a")), names_of(1, 3)
        assert await directory.announce(a, 1, held(names))
        directory = await self.empty(directory)
        assert not await directory.beat(a, 1)
        assert not await directory.announce(a, 2, held(names))
        assert await directory.find(names) == []
        again = await directory.join(worker_of("a"), first=a, last=a)
        assert again > a
        assert await directory.announce(again, 1, held(names))
        assert len(await directory.find(names)) == 3

    async def test_emptied_it_takes_none_for_another(self, directory: Directory) -> None:
        """It counts anew, and so may come to numbers that others think they have."""
        a, b = await directory.join(worker_of("a")), await directory.join(worker_of("b"))
        for epoch in (a, b):
            assert await directory.announce(epoch, 1, held(names_of(1, 1)))
        directory = await self.empty(directory)
        again = await directory.join(worker_of("a"), first=a, last=a)
        assert number_of(again) == number_of(b)
        assert await directory.announce(again, 1, held(names_of(2, 2)))
        assert not await directory.beat(b, 1)
        assert not await directory.announce(b, 2, held(names_of(1, 1)))
        await directory.leave(b)
        assert len(await directory.find(names_of(2, 2))) == 2
        assert await directory.find(names_of(1, 1)) == []

    async def test_a_report_is_of_what_was_found(self, directory: Directory) -> None:
        a, b = await directory.join(worker_of("a")), await directory.join(worker_of("b"))
        names = names_of(1, 2)
        for epoch in (a, b):
            assert await directory.announce(epoch, 1, held(names))
        await directory.report(names[0], ChunkHolder(number_of(a), 1))
        assert await directory.find(names[:1]) == [(ChunkHolder(number_of(b), 1),)]
        assert len((await directory.find(names[1:]))[0]) == 2
        assert await directory.announce(b, 2, held(names, 2))
        await directory.report(names[0], ChunkHolder(number_of(b), 1))
        assert await directory.find(names[:1]) == [(ChunkHolder(number_of(b), 2),)]
        await directory.report(names[0], ChunkHolder(number_of(b), 2))
        assert await directory.find(names) == []
        assert await self.size(directory) == 1

    async def test_the_dead_are_swept(self, directory: Directory) -> None:
        a = await directory.join(worker_of("a", heartbeat=60.0))
        b = await directory.join(worker_of("b", heartbeat=60.0))
        names = [name for seed in range(3) for name in names_of(seed, 1000)]
        for at in range(3):
            assert await directory.announce(a, at + 1, held(names[1000 * at : 1000 * at + 1000]))
        assert await directory.announce(b, 1, held(names[:10]))
        assert await self.size(directory) == 3000
        await directory.leave(a)
        for _ in range(200):
            await self.wait(0.1)
            assert len(await directory.find(names[:20])) == 10
            await directory.sweep(5000)
            if await self.size(directory) == 10:
                break
        assert await self.size(directory) == 10
        assert await directory.find(names[:20]) == [(ChunkHolder(number_of(b), 1),)] * 10

    async def test_of_one_chunk_so_many_holders(self, directory: Directory) -> None:
        names = names_of(1, 2)
        for i in range(MOST_HOLDERS + 6):
            epoch = await directory.join(worker_of(f"w{i}", heartbeat=60.0))
            assert await directory.announce(epoch, 1, held(names[:1]))
        (holders,) = await directory.find(names)
        assert len(holders) == MOST_HOLDERS
        assert number_of(epoch) in {holder.number for holder in holders}

    async def test_workers_say_who_they_are(self, directory: Directory) -> None:
        record = worker_of(
            "näme", model="m", namespace="ab" * 32, fields={"model": "m"}, share="0-7",
            addresses=("tcp://h:1", "unix:///x"), chunk=64, grain=16, keys="sglang", rank=3,
        )  # fmt: skip
        epoch = await directory.join(record)
        (member,) = (await directory.workers()).values()
        assert member == (epoch, record)
        assert await directory.workers([number_of(epoch), 77]) == {number_of(epoch): member}
