"""Writers and readers that are killed, or stopped and let go on, in the middle of it: nothing is
written, and nothing is read, after its lease has gone to another; nobody waits long; nothing leaks.

Few rounds by default; many with -m campaign, whose figures are printed (-s)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import processes
import pytest

from tierloom.stages.errors import Lost
from tierloom.stages.memory.arena import Arena, Lease
from tierloom.stages.tiers.landing.landing_protocol import AgentCard, Landed
from tierloom.stages.tiers.landing.receiver import Receiver
from tierloom.stages.tiers.landing.sender import Sender, Sending
from tierloom.testing import Pool

from .landing_pairs import (
    bytes_of,
    environment,
    keep_large,
    reader,
    ready,
    receiver_of,
    settled,
    true,
    writer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

processes.need("nixl", "nixl_cu12")
pytestmark = pytest.mark.anyio
ROUNDS = int(os.environ.get("TIERLOOM_ROUNDS", "200"))
LIMIT = 0.3
MIB = 1 << 20


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["shm", "tcp"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in environment(request.param).items():
        monkeypatch.setenv(name, value)
    return str(request.param)


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(96 * MIB)
    yield arena
    until = time.monotonic() + 20
    while arena.leases and time.monotonic() < until:
        time.sleep(0.01)
    assert arena.leases == 0
    arena.close()


def held_by(pid: int | str) -> tuple[int, int]:
    """Descriptors and threads of a process."""
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


class Figures:
    def __init__(self, what: str) -> None:
        self.what, self.seen = what, dict[str, list[float]]()

    def add(self, name: str, value: float) -> None:
        self.seen.setdefault(name, []).append(value)

    def tell(self) -> None:
        for name, values in self.seen.items():
            values.sort()
            middle = values[len(values) // 2]
            text = f"{len(values)} times, median {middle:.4g}, longest {values[-1]:.4g}"
            print(f"{self.what}: {name}: {text}")


async def writer_faults(way: str, arena: Arena, folder: Path, rounds: int) -> None:
    """An engine is stopped at a moment of a read that is drawn by chance, every tenth time killed.
    What is free by then of the memory to land in is filled with a pattern, and the engine goes on.
    """
    rng, figures = random.Random(rounds), Figures(f"writer, {way}")
    other = writer(folder / "other", way, room=256 * MIB)
    try:
        (right,) = keep_large(other, folder, arena, 1)
        options = {"timeout": LIMIT, "probe": 0.05, "landing": 128 * MIB}
        async with reader(other.url, arena, Pool(), size=len(right), **options) as tier:
            receiver, (holder,) = receiver_of(tier), tier.holders.values()
            assert holder._landed is not None
            landed = 0
            for turn in range(rounds):
                await true(lambda: holder.healthy)
                holder._landed._not_before = 0.0
                await settled(receiver)
                begun = time.monotonic()
                while receiver.landed == landed:
                    came = await bytes_of(tier, 1)
                    assert came == right or not isinstance(came, bytes), "a wrong byte"
                    assert time.monotonic() - begun < 30, "nothing lands any more"
                    holder._landed._not_before = 0.0
                figures.add("lands again after, s", time.monotonic() - begun)
                landed = receiver.landed
                killed = turn % 10 == 9
                act = other.kill if killed else other.pause
                timer = threading.Timer(rng.uniform(0, 0.012), act)
                begun = time.monotonic()
                timer.start()
                while timer.is_alive() or holder.healthy:
                    begun = time.monotonic()
                    came = await bytes_of(tier, 1)
                    assert came == right or not isinstance(came, bytes), "a wrong byte"
                timer.join()
                end = "killed" if killed else "stopped"
                figures.add(f"{end}: back after the limit, s", time.monotonic() - begun - LIMIT)
                begun = time.monotonic()
                await settled(receiver)
                figures.add(f"{end}: nothing in doubt after, s", time.monotonic() - begun)
                assert receiver._region is not None
                guard = np.ctypeslib.as_array(_bytes(receiver._region))
                guard[:] = 0xA5
                if killed:
                    other.start()
                    keep_large(other, folder, arena, 1)
                else:
                    other.resume()
                await moved(receiver, 0.2)
                assert (guard == 0xA5).all(), "written after its lease was given back"
            figures.add("fences", receiver.fences)
            figures.add("landed", receiver.landed)
    finally:
        other.resume()
        other.kill()
    figures.tell()


async def moved(receiver: Receiver, seconds: float) -> None:
    """Have what is in its sockets get to where it was sent."""
    place = receiver.lease(4096)
    assert place is not None
    receiver.post(lambda: None)
    await anyio.sleep(seconds)
    receiver.free(place)


async def expiries(way: str, arena: Arena, folder: Path, rounds: int) -> None:
    """Reads are given up at a moment drawn by chance; places that came back are filled."""
    rng, figures = random.Random(rounds), Figures(f"expiries, {way}")
    other = writer(folder / "other", way, room=256 * MIB)
    try:
        (right,) = keep_large(other, folder, arena, 1)
        async with reader(other.url, arena, Pool(), size=len(right), landing=256 * MIB) as tier:
            receiver, expired = receiver_of(tier), 0
            (holder,) = tier.holders.values()
            assert holder._landed is not None
            while expired < rounds:
                came: Any = None
                for turn in range(21):  # the first has the time it takes
                    limit = rng.uniform(0, 0.012) if turn else 20
                    with anyio.move_on_after(limit) as scope:
                        came = await bytes_of(tier, 1)
                        assert came == right or came in (Lost.NO_ROOM, Lost.TIER_DOWN)
                    expired += scope.cancelled_caught
                begun = time.monotonic()
                await settled(receiver)
                figures.add("nothing in doubt after, s", time.monotonic() - begun)
                assert receiver._region is not None
                guard = np.ctypeslib.as_array(_bytes(receiver._region))[: 3 * len(right)]
                guard[:] = 0xA5
                await moved(receiver, 0.02)
                assert (guard == 0xA5).all(), "written after its lease was given back"
            assert receiver.landed, "nothing landed"
            figures.add("expired", expired)
            figures.add("fences", receiver.fences)
            figures.add("landed", receiver.landed)
    finally:
        other.kill()
    figures.tell()


def _bytes(region: Any) -> Any:
    import ctypes

    return (ctypes.c_uint8 * region.total).from_address(region.address)


class Reader:
    """A process with memory to land in."""

    def __init__(self, way: str) -> None:
        env = os.environ | environment(way) | {"PYTHONSAFEPATH": "1"}
        program = str(Path(__file__).with_name("landing_reader.py"))
        self.child = subprocess.Popen(
            [sys.executable, program], env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=processes.die_with_parent,
        )  # fmt: skip

    def tell(self, **what: Any) -> Any:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(json.dumps(what) + "\n")
        self.child.stdin.flush()
        return json.loads(self.child.stdout.readline())

    def signal(self, name: str) -> None:
        import signal

        self.child.send_signal(getattr(signal, name))

    def close(self) -> None:
        self.signal("SIGKILL")
        for pipe in (self.child.stdin, self.child.stdout):
            assert pipe is not None
            pipe.close()
        self.child.wait()


async def _write(sender: Sender, target: Reader, lease: Lease, nbytes: int) -> Landed:
    name, address, room, metadata, place, ticket = target.tell(lease=nbytes)
    assert await sender.meet(AgentCard(name, address, room, bytes.fromhex(metadata)))
    sending = Sending(name, lease, 0, nbytes, place, ticket)
    sender.send(sending)
    landed = await sending.done
    target.tell(free=True)
    sender.part(name)
    return landed


async def reader_faults(way: str, arena: Arena, rounds: int) -> None:
    """A process is stopped while we write into it. Once the source's lease is released it is filled
    with something else, which must not get there when the process goes on, and we write to another.
    """
    rng, figures = random.Random(rounds), Figures(f"reader, {way}")
    sender, room = Sender(arena, "UCX", {}), 18 * MIB
    target, another = Reader(way), Reader(way)
    try:
        for turn in range(rounds):
            name, address, nbytes, metadata, place, ticket = target.tell(lease=room)
            card = AgentCard(name, address, nbytes, bytes.fromhex(metadata))
            assert await sender.meet(card)
            lease = arena.lease(room)
            lease.view[:] = b"\x11" * room
            timer = threading.Timer(rng.uniform(0, 0.01), target.signal, ["SIGSTOP"])
            if turn % 3:
                timer.start()
            else:
                target.signal("SIGSTOP")  # before anything has come
            sending = Sending(name, lease, 0, room, place, ticket)
            lease.release()
            begun = time.monotonic()
            sender.send(sending)
            if turn % 2:
                sender.give_up(sending)
            with anyio.fail_after(20):
                landed = await sending.done
            if turn % 3:
                timer.join()
            figures.add("source let go after, s", time.monotonic() - begun)
            figures.add("not all written", bool(landed.code))
            again = arena.lease(room)
            assert again.offset == lease.offset
            again.view[:] = b"\xee" * room
            target.signal("SIGCONT")
            for _ in range(3):
                assert (await _write(sender, another, again, 4096)).code == 0
            assert target.tell(count=0xEE) == 0, "read after its lease was released"
            if not landed.code:
                assert target.tell(count=0x11) == room
            again.release()
            target.tell(free=True)
            sender.part(name)
            if landed.code:  # what has broken is not used again
                target.close()
                target = Reader(way)
        figures.add("fences", sender.fences)
    finally:
        target.close()
        another.close()
        sender.close()
    figures.tell()


async def reconnects(way: str, arena: Arena, folder: Path, rounds: int, restart: int) -> None:
    """A tier is opened and closed, and every now and then the engine restarted."""
    other = writer(folder / "other", way, room=256 * MIB)
    seen: list[tuple[int, int]] = []
    theirs: list[tuple[int, int]] = []
    try:
        (right,) = keep_large(other, folder, arena, 1)
        for turn in range(rounds):
            async with reader(other.url, arena, Pool(), size=len(right)) as tier:
                for again in range(2):
                    assert await bytes_of(tier, 1) == right
                    if restart and turn % restart == restart - 1 and not again:
                        other.kill()
                        other.start()
                        keep_large(other, folder, arena, 1)
                        theirs.clear()
                        await tier.exists([b"k" * 32])
                        await ready(tier, len(right))
                        await true(lambda t=tier: bool(t.healthy))  # type: ignore[misc]
                assert receiver_of(tier).landed == 2
                theirs.append(held_by(other.pid))
            seen.append(held_by("self"))
        print(f"reconnects, {way}: ours {seen[2]} to {seen[-1]}, theirs {theirs[0]}, {theirs[-1]}")
        assert seen[-1][0] <= seen[2][0] + 2
        assert seen[-1][1] <= seen[2][1] + 2
        # NIXL keeps one descriptor of each agent that has gone; after 500 the agent is made anew.
        assert theirs[-1][0] - theirs[0][0] <= len(theirs) + 4
        assert theirs[-1][1] == theirs[0][1]
    finally:
        other.kill()


@pytest.mark.parametrize("way", ["tcp"], indirect=True)
async def test_a_writer_dies_or_hangs(way: str, arena: Arena, tmp_path: Path) -> None:
    await writer_faults(way, arena, tmp_path, 1)


@pytest.mark.parametrize("way", ["tcp"], indirect=True)
async def test_a_reader_hangs(way: str, arena: Arena) -> None:
    await reader_faults(way, arena, 1)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
async def test_many_writers_die_or_hang(way: str, arena: Arena, tmp_path: Path) -> None:
    await writer_faults(way, arena, tmp_path, ROUNDS)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
async def test_many_reads_are_given_up(way: str, arena: Arena, tmp_path: Path) -> None:
    await expiries(way, arena, tmp_path, 50 * ROUNDS)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
async def test_many_readers_hang(way: str, arena: Arena) -> None:
    await reader_faults(way, arena, max(4, ROUNDS // 4))


@pytest.mark.campaign
@pytest.mark.timeout(3600)
async def test_many_reconnects(way: str, arena: Arena, tmp_path: Path) -> None:
    await reconnects(way, arena, tmp_path, ROUNDS, 20)
