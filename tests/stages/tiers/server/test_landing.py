"""Objects that a real engine writes into our memory by NIXL, over shared memory and over TCP: the
contract, the same bytes, and those who lie."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import processes
import pytest
import xxhash

from tierloom.stages.errors import Lost, MissingPackage
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.tier import Read, TierContext, TierStat, require_sealed
from tierloom.stages.tiers.landing import landing_protocol as landing_wire
from tierloom.stages.tiers.landing.landing_protocol import AgentCard, LandingPlace
from tierloom.stages.tiers.landing.region import LandingRegion
from tierloom.stages.tiers.nixl.agent import Agent
from tierloom.stages.tiers.peers.options import PeerOptions
from tierloom.stages.tiers.peers.tier import Peer
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.protocol import Kind
from tierloom.testing import NAMESPACE, SIZE, Pool, TierContract, key_of, make_object
from tierloom.triton_kernels.checksum.copy_cpu import copy_hashed

from .landing_pairs import (
    ALL,
    TOKENS,
    bytes_of,
    environment,
    keep,
    keep_large,
    reader,
    ready,
    receiver_of,
    settled,
    true,
    writer,
)
from .raw_client import FalseServer, is_closed, receive, welcomed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from peer_process import EngineProcess

    from tierloom.stages.kv.object import Object
    from tierloom.testing import Clock

processes.need("nixl", "nixl_cu12")
LARGE = 80 << 20


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module", params=["shm", pytest.param("tcp", marks=pytest.mark.campaign)])
def other(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(request.param).items():
            patch.setenv(name, value)
        process = writer(tmp_path_factory.mktemp("other"), request.param, room=512 << 20)
        yield process
        assert process.stop() == 0, process.log.read_text()


class Written(Peer):
    """Puts and deletes for it are done by the engine that writes, as it is told."""

    def __init__(self, other: EngineProcess, folder: Path, ctx: TierContext) -> None:
        options = PeerOptions(directory=[other.url], timeout=20, wire="nixl", landing=64 * SIZE)
        super().__init__(options, ctx)
        self._other, self._folder = other, folder

    async def open(self) -> None:
        self._other.tell(clear=[])
        await super().open()
        await ready(self, SIZE)

    async def put(self, objects: Sequence[Object]) -> list[Lost | None]:
        require_sealed(*objects)
        codes = keep(self._other, self._folder, *objects)
        self.counts.puts += codes.count(0)
        self.counts.bytes_in += sum(o.header.nbytes for o in objects)
        return [Lost(code) if code else None for code in codes]

    async def delete(self, keys: Sequence[bytes]) -> int:
        return int(self._other.tell(delete=[[key.hex() for key in keys]]))

    async def clear(self) -> int:
        return int(self._other.tell(clear=[]))

    def stat(self) -> TierStat:
        return TierStat(*self._other.tell(stat=[]))


class TestLanded(TierContract):
    ttl = bounded = False

    @pytest.fixture(params=["asyncio"])
    def anyio_backend(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture(autouse=True)
    def _other(self, other: EngineProcess) -> None:
        self._process = other

    def make(self, ctx: TierContext, folder: Path, clock: Clock, **options: Any) -> Peer:
        return Written(self._process, folder, ctx)

    @pytest.mark.anyio
    async def test_they_do_land(
        self, ctx: TierContext, tmp_path: Path, clock: Clock, arena: Arena
    ) -> None:
        async with self.opened(ctx, tmp_path, clock) as tier:
            assert isinstance(tier, Peer)
            await self.put(tier, 1, 2)
            held = await self.first_frame(tier, 1)
            await tier.read([Read(key_of(1), ALL, held)])
            assert bytes(held.lease.view[:SIZE]) == self.bytes_of(arena, 1)
            held.lease.release()
            assert await self.get(tier, 2) == self.bytes_of(arena, 2)
            assert receiver_of(tier).landed == 3


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(LARGE)
    yield arena
    until = time.monotonic() + 20
    while arena.leases and time.monotonic() < until:
        time.sleep(0.01)
    assert arena.leases == 0
    arena.close()


@pytest.mark.anyio
async def test_objects_of_several_writes(
    other: EngineProcess, arena: Arena, tmp_path: Path
) -> None:
    """Their frames end within writes, their header is longer than a page; also frame by frame, many
    at once, and more than the landing space has room for: those come inline."""
    other.tell(clear=[])
    right = keep_large(other, tmp_path, arena, 1, 2, 3, 4)
    async with reader(other.url, arena, Pool(), size=len(right[0]), landing=40 << 20) as tier:
        receiver = receiver_of(tier)
        assert await bytes_of(tier, 1) == right[0]
        read = Read(key_of(2, TOKENS), 1)
        for upto in (1, 2, ALL):
            read.upto = upto
            await tier.read([read])
        assert read.object is not None
        assert bytes(read.object.lease.view[: len(right[1])]) == right[1]
        read.object.lease.release()
        assert receiver.landed == 4
        reads = [Read(key_of(seed, TOKENS), ALL) for seed in (1, 2, 3, 4)]
        await tier.read(reads)
        for each, expected in zip(reads, right, strict=True):
            assert each.object is not None
            assert bytes(each.object.lease.view[: len(expected)]) == expected
            each.object.lease.release()
        assert receiver.landed == 6
        await settled(receiver)
        assert receiver.fences == 0


@pytest.mark.anyio
async def test_longer_than_was_expected(other: EngineProcess, arena: Arena, tmp_path: Path) -> None:
    """It comes inline, and the next of that length lands."""
    other.tell(clear=[])
    (right,) = keep_large(other, tmp_path, arena, 5)
    async with reader(other.url, arena, Pool(), size=SIZE) as tier:
        assert await bytes_of(tier, 5) == right
        assert receiver_of(tier).landed == 0
        assert await bytes_of(tier, 5) == right
        assert receiver_of(tier).landed == 1


@pytest.mark.anyio
async def test_given_up(other: EngineProcess, arena: Arena, tmp_path: Path) -> None:
    """A reader that goes at any moment leaves a place that is given back without a fence, and into
    which nothing is written any more."""
    other.tell(clear=[])
    (right,) = keep_large(other, tmp_path, arena, 6)
    async with reader(other.url, arena, Pool(), size=len(right), landing=256 << 20) as tier:
        receiver = receiver_of(tier)
        assert await bytes_of(tier, 6) == right
        for turn in range(12):
            with anyio.move_on_after(turn * 0.0008):
                await bytes_of(tier, 6)
        await settled(receiver)
        assert receiver._region is not None
        assert receiver._region.space.used == 0
        assert receiver.fences == 0
        guard = np.frombuffer(_view(receiver._region), np.uint8)
        guard[:] = 0xA5
        await anyio.sleep(0.1)
        assert (guard == 0xA5).all(), "written after its lease was given back"
        assert await bytes_of(tier, 6) == right


def _view(region: LandingRegion) -> Any:
    import ctypes

    return (ctypes.c_uint8 * region.total).from_address(region.address)


def card_of(region: LandingRegion, name: str) -> tuple[Agent, AgentCard]:
    agent = Agent("UCX", {}, region, shared=False, name=name, polled=True)
    return agent, AgentCard(name, region.address, region.total, agent.metadata)


def asked(sock: socket.socket, kind: Kind, body: bytes) -> wire.Message | None:
    """The answer; None: the connection was closed instead."""
    sock.sendall(wire.message(kind, 7, body))
    try:
        answer = receive(sock)
    except ConnectionError:
        return None
    if answer.kind is Kind.ERROR:
        assert is_closed(sock)
        return None
    return answer


def proven(card: AgentCard, said: bytes) -> AgentCard:
    return card._replace(proof=wire.proof(b"", b"agent", said, card.said))


@contextlib.contextmanager
def client(other: EngineProcess) -> Iterator[tuple[socket.socket, bytes]]:
    """A connection that offers memory, and what both sides proved on it."""
    said: list[bytes] = []
    proof = wire.proof

    def noted(token: bytes, side: bytes, *words: bytes) -> bytes:
        said[:] = [b"".join(words)]
        return proof(token, side, *words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "proof", noted)
        sock = welcomed(other.url, flags=wire.LANDS)
    with sock:
        yield sock, said[0]


def place(card: AgentCard, address: int, room: int) -> bytes:
    return landing_wire.pack_places([LandingPlace(key_of(1), 0, ALL, 0, address, room, 77)])


def test_forged_agents_and_places(other: EngineProcess) -> None:
    """Who did not say what is proved, who is not who he says, what lies outside of what was
    declared: each is refused, and the engine goes on serving."""
    region = LandingRegion(1 << 20)
    names = (f"forger-{os.getpid()}-{n}" for n in itertools.count())
    agent, card = card_of(region, next(names))
    end = region.address + region.total
    with client(other) as (sock, said):
        assert asked(sock, Kind.LAND, place(card, region.address, 4096)) is None
    with client(other) as (sock, said):
        assert asked(sock, Kind.AGENT, card.pack()) is None, "nobody vouches for it"
    with client(other) as (sock, said):
        moved = proven(card, said)._replace(address=region.address + 4096)
        assert asked(sock, Kind.AGENT, moved.pack()) is None, "altered on its way"
    refused = wire.message(Kind.AGREED, 7, bytes([Lost.TIER_DOWN]))
    for false in (
        card._replace(metadata=b"nixlSerDes|" + bytes(300)), card._replace(metadata=b"x"),
        card._replace(metadata=card.metadata[:-9]), card._replace(name="somebody else"),
    ):  # fmt: skip
        with client(other) as (sock, said):
            answer = asked(sock, Kind.AGENT, proven(false, said).pack())
            assert answer is not None
            assert wire.message(*answer) == refused
    with client(other) as (sock, said):
        answer = asked(sock, Kind.AGENT, proven(card, said).pack())
        assert answer == (Kind.AGREED, 7, bytes([wire.DONE]))
        with client(other) as (second, words):  # another's metadata under a name that is known
            forged = proven(card._replace(metadata=card.metadata + b"x"), words)
            answer = asked(second, Kind.AGENT, forged.pack())
            assert answer == (Kind.AGREED, 7, bytes([Lost.TIER_DOWN]))
        assert asked(sock, Kind.LAND, place(card, end - 4096, 8192)) is None
    for address, room in ((region.address - 1, 1), (end, 1), (0, 1 << 62), (1 << 62, 1 << 62)):
        with client(other) as (sock, said):
            asked(sock, Kind.AGENT, proven(card, said).pack())
            assert asked(sock, Kind.LAND, place(card, address, room)) is None
    agent.destroy()
    region.close()
    with client(other) as (sock, _):
        assert asked(sock, Kind.PING, b"") == (Kind.PONG, 7, b"")


def test_who_offers_nothing_is_promised_nothing(other: EngineProcess) -> None:
    with welcomed(other.url) as sock:
        assert asked(sock, Kind.LAND, b"") is None


@pytest.mark.anyio
@pytest.mark.parametrize("posted", [1, 9])
async def test_who_says_that_he_wrote_and_did_not(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, posted: int
) -> None:
    """The place is used by nobody until the fence, and what was asked for comes inline."""
    for name, value in environment("tcp").items():
        monkeypatch.setenv(name, value)
    made = make_object(arena, 1)
    right = bytes(made.lease.view[:SIZE])
    made.lease.release()
    lands = 0

    def answer(sock: socket.socket, message: wire.Message) -> None:
        nonlocal lands
        number = message.number
        item = wire.pack(wire.Item(0, 3, SIZE, 0, SIZE))
        if message.kind is Kind.AGENT:
            sock.sendall(wire.message(Kind.AGREED, number, bytes([wire.DONE])))
        elif message.kind is Kind.LAND:
            lands += 1
            ticket = landing_wire._LANDING.unpack(message.body)[-1]
            landed = landing_wire.pack_landed(landing_wire.Landed(0, posted, ticket))
            sock.sendall(wire.message(Kind.LANDING, number, item))
            sock.sendall(wire.message(Kind.LANDED, number, landed))
        elif message.kind is Kind.GET:
            sock.sendall(wire.message(Kind.ITEM, number, item) + right)
        elif message.kind is Kind.HAS:
            sock.sendall(wire.message(Kind.HAD, number, bytes([wire.DONE])))
        elif message.kind is Kind.PING:
            sock.sendall(wire.message(Kind.PONG, number))

    server = FalseServer(answer, flags=wire.LANDS)
    try:
        async with reader(server.url, arena, Pool(), size=SIZE, probe=0.05) as tier:
            receiver = receiver_of(tier)
            first = await bytes_of(tier, 1, tokens=64)
            assert first == (right if posted == 1 else Lost.TIER_DOWN)
            await true(lambda: bool(receiver.fences and tier.healthy))
            assert await bytes_of(tier, 1, tokens=64) == right
            assert lands == 1, "asked again although it lied"
    finally:
        server.close()


@pytest.mark.anyio
async def test_an_engine_without_it_sends_inline(
    arena: Arena, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = writer(tmp_path / "other", "tcp", room=32 << 20, wire="inline")
    try:
        (right,) = keep_large(other, tmp_path, arena, 1)
        options = PeerOptions(directory=[other.url], timeout=20, wire="auto")
        tier = Peer(options, TierContext(arena, NAMESPACE, Pool()))
        await tier.open()
        for _ in range(3):
            assert await bytes_of(tier, 1) == right
        assert not tier.receiver or tier.receiver.card is None, "made although nobody writes"
        await tier.close()
        assert not caplog.messages
    finally:
        other.kill()


@pytest.mark.anyio
async def test_without_the_package(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tierloom.stages.tiers.nixl.installed.WHEELS", ("no_such_package",))
    for way, cause in (("auto", None), ("nixl", MissingPackage)):
        options = PeerOptions(directory=["127.0.0.1:1"], wire=way)
        tier = Peer(options, TierContext(arena, NAMESPACE, Pool()))
        with pytest.raises(cause) if cause else contextlib.nullcontext():
            await tier.open()
        assert tier.receiver is None
        await tier.close()
    assert not caplog.messages


@pytest.mark.parametrize("n", [0, 1, 240, 241, 4096, 32768, 32769, 65536, 100_001, 3 << 20])
def test_a_copy_and_its_checksum(n: int) -> None:
    source = np.random.default_rng(n).integers(0, 256, n + 64, dtype=np.uint8)
    whole = np.zeros(n + 192, np.uint8)
    start = -whole.ctypes.data % 64 + 64
    to = whole[start : start + n]
    found = copy_hashed(to.ctypes.data if n else 64, source.ctypes.data + 1, n)
    assert found == xxhash.xxh3_64_intdigest(source[1 : n + 1].tobytes())
    assert (to == source[1 : n + 1]).all()
    assert not whole[:start].any()
    assert not whole[start + n :].any()
