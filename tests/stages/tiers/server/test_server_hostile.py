"""Clients that lie, stop half way and die: nobody else notices. Servers that lie: a miss."""

from __future__ import annotations

import contextlib
import gc
import random
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from store_server import Within

from tierloom.pipeline.serve import listener
from tierloom.stages.errors import Lost, TierDown
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.tier import Read, TierContext
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.protocol import Kind
from tierloom.stages.tiers.server.tier import Server, ServerOptions
from tierloom.testing import ALL, SIZE, TierBench, key_of, make_object, mutations

from .raw_client import FalseServer, connected, greet, is_closed, receive, reset, welcomed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Within]:
    """A server with little patience, which holds nothing of anybody's in the end."""
    monkeypatch.setattr(listener, "_STALL", 0.5)
    monkeypatch.setattr(listener, "_HELLO", 1.0)
    made = Within(tmp_path / "socket")
    yield made
    store = made.serving.store
    eventually(
        lambda: store.arena.flight == 0 and store.arena.promises.spare == store.arena.working
    )
    eventually(lambda: made.serving.listener.lending.nbytes == 0)
    eventually(lambda: not made.serving.listener.sessions)
    made.stop()


def eventually(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(params=[0, 1], ids=["tcp", "unix"])
def url(request: pytest.FixtureRequest, within: Within) -> str:
    return within.urls[request.param]


def question(kind: Kind, body: bytes = b"") -> bytes:
    return wire.message(kind, 7, body)


def unharmed(url: str) -> None:
    """Somebody else is served as if nothing had happened."""
    with welcomed(url) as sock:
        sock.sendall(question(Kind.HAS, key_of(1)))
        assert receive(sock) == (Kind.HAD, 7, bytes([Lost.ABSENT]))


BAD = {
    "no message": b"GET / HTTP/1.1\r\n\r\n",
    "another version": b"TW\x02" + question(Kind.PING)[3:],
    "a kind that is none": question(Kind.PING)[:3] + b"\xee" + question(Kind.PING)[4:],
    "an answer": question(Kind.PONG),
    "a second hello": question(Kind.HELLO, bytes(104)),
    "a body too long": wire.HEAD.pack(b"TW", 1, Kind.HAS, 1, wire.BODY + 1, 0),
    "half a key": question(Kind.HAS, bytes(33)),
    "too many keys": question(Kind.HAS, bytes(32 * 4097)),
    "too many objects": question(Kind.GET, bytes(48 * 257)),
    "half an offer": question(Kind.PUT, bytes(41)),
    "a body where none belongs": question(Kind.CLEAR, b"x"),
    "borrowing what is not shared": question(Kind.BORROW, bytes(32)),
    "returning what was not lent": question(Kind.RETURN, bytes(8)),
}


@pytest.mark.parametrize("raw", BAD.values(), ids=BAD)
def test_a_bad_message_ends_the_connection(url: str, raw: bytes) -> None:
    with welcomed(url) as sock:
        sock.sendall(raw)
        kind, _, body = receive(sock)
        assert kind is Kind.ERROR
        assert wire.error_of(body)[0] == wire.ErrorCode.MALFORMED
        assert is_closed(sock)
    unharmed(url)


@pytest.mark.parametrize("raw", [question(Kind.HAS, bytes(32)), question(Kind.CLEAR), b"x" * 2000])
def test_nothing_is_answered_before_the_hello(url: str, raw: bytes) -> None:
    with connected(url) as sock:
        receive(sock)
        sock.sendall(raw)
        assert receive(sock).kind is Kind.ERROR
        assert is_closed(sock)


def test_who_says_nothing_is_sent_away(url: str) -> None:
    with connected(url) as sock:
        receive(sock)
        assert is_closed(sock)


@pytest.mark.parametrize("cut", [1, 8, 16, 20])
def test_half_a_message_and_then_silence(url: str, cut: int) -> None:
    with welcomed(url) as sock:
        sock.sendall(question(Kind.HAS, key_of(1))[:cut])
        assert is_closed(sock)
    unharmed(url)


@pytest.mark.parametrize("cut", [1, 16, 30])
def test_half_a_message_and_then_death(url: str, cut: int) -> None:
    sock = welcomed(url)
    sock.sendall(question(Kind.HAS, key_of(1))[:cut])
    reset(sock)
    unharmed(url)


def offer(sock: socket.socket, *offers: tuple[bytes, int]) -> list[int]:
    sock.sendall(question(Kind.PUT, wire.pack(*[wire.Offer(*each) for each in offers])))
    return list(receive(sock).body)


@pytest.fixture
def whole() -> Iterator[bytes]:
    """The bytes of object 1."""
    arena = Arena(2 * SIZE, huge_pages=False)
    obj = make_object(arena, 1)
    yield bytes(obj.lease.view[:SIZE])
    obj.lease.release()
    del obj
    arena.close()


@pytest.mark.parametrize("ending", ["dies", "stalls"])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_half_an_object_is_never_seen(
    within: Within, url: str, whole: bytes, ending: str, part: float
) -> None:
    sock = welcomed(url)
    assert offer(sock, (key_of(1), SIZE)) == [wire.SEND]
    sock.sendall(whole[: int(part * SIZE)])
    unharmed(url)
    assert within.serving.store.arena.flight == SIZE
    if ending == "dies":
        reset(sock)
    else:
        assert is_closed(sock)
        sock.close()
    eventually(lambda: within.serving.store.arena.flight == 0)
    unharmed(url)


def test_lengths_that_are_lies(url: str, whole: bytes) -> None:
    with welcomed(url) as sock:
        assert offer(sock, (key_of(1), 1 << 62), (key_of(2), 100), (key_of(3), 0)) == [
            Lost.NO_ROOM, Lost.CORRUPT, Lost.CORRUPT,
        ]  # fmt: skip
        assert receive(sock).kind is Kind.KEPT
        for nbytes in (SIZE - 4096, SIZE + 4096):
            assert offer(sock, (key_of(1), nbytes)) == [wire.SEND]
            sock.sendall((whole + bytes(4096))[:nbytes])
            assert receive(sock).body[0] == Lost.CORRUPT
        assert offer(sock, (key_of(2), SIZE)) == [wire.SEND]
        sock.sendall(whole)  # another's key
        assert receive(sock).body[0] == Lost.CORRUPT
        for at in range(0, 4096, 97):
            bad = bytearray(whole)
            bad[at] ^= 1
            assert offer(sock, (key_of(1), SIZE)) == [wire.SEND]
            sock.sendall(bad)
            assert receive(sock).body[0] == Lost.CORRUPT
        assert offer(sock, (key_of(1), SIZE)) == [wire.SEND]
        sock.sendall(whole)
        assert receive(sock).body[0] == wire.DONE
        sock.sendall(question(Kind.CLEAR))
        receive(sock)


def fill(url: str, arena: Arena, *seeds: int) -> None:
    """Put objects, as a client that does it right."""
    with welcomed(url) as sock:
        for seed in seeds:
            obj = make_object(arena, seed)
            assert offer(sock, (key_of(seed), SIZE)) == [wire.SEND]
            sock.sendall(obj.lease.view[:SIZE])
            assert receive(sock).body[0] == wire.DONE
            obj.lease.release()


def resident(pid: int | str = "self") -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


LIES = {
    "longer than the largest": wire.Item(0, 3, 1 << 40, 0, SIZE),
    "longer than itself": wire.Item(0, 3, SIZE, 0, SIZE + 4096),
    "beginning behind its end": wire.Item(0, 3, SIZE, 8192, 4096),
    "without its header": wire.Item(0, 3, SIZE, 4096, SIZE),
    "shorter than a header": wire.Item(0, 3, SIZE, 0, 8),
    "of no length": wire.Item(0, 3, 0, 0, 0),
    "half a page": wire.Item(0, 3, SIZE + 8, 0, SIZE),
    "more frames than asked for": wire.Item(0, 9, SIZE, 0, SIZE),
    "an unknown code": wire.Item(77, 0, 0, 0, 0),
}


class TestAgainstServers(TierBench):
    """The tier, against servers that lie."""

    @pytest.fixture(params=["asyncio"])
    def anyio_backend(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @contextlib.contextmanager
    def false(self, answer: Any, **options: Any) -> Iterator[FalseServer]:
        server = FalseServer(answer, **options)
        yield server
        server.close()

    @contextlib.asynccontextmanager
    async def asking(self, url: str, ctx: TierContext) -> Any:
        tier = Server(ServerOptions(url=url), ctx)
        await tier.open()
        try:
            yield tier
        finally:
            await tier.close()

    @pytest.mark.anyio
    @pytest.mark.parametrize("at", [0, 4, 40, 70, 200, 240])
    async def test_a_header_that_is_not_what_was_asked(
        self, ctx: TierContext, whole: bytes, at: int
    ) -> None:
        dropped: list[bytes] = []

        def answer(sock: socket.socket, message: wire.Message) -> None:
            if message.kind is Kind.DROP:
                dropped.append(message.body)
                holds = wire.pack(wire.Holdings(1, 0, 0, 0, 0))
                sock.sendall(wire.message(Kind.HOLDS, message.number, holds))
                return
            upto = min(3, wire.unpack_all(wire.Wanted, message.body, wire.OBJECTS)[0].upto)
            end = SIZE if upto else 4096
            bad = bytearray(whole[:end])
            bad[at] ^= 1
            item = wire.pack(wire.Item(0, upto, SIZE, 0, end))
            sock.sendall(wire.message(Kind.ITEM, message.number, item) + bad)

        with self.false(answer) as server:
            async with self.asking(server.url, ctx) as tier:
                assert await self.get(tier, 1) is Lost.CORRUPT
                assert dropped == [key_of(1)], "a bad object was left where it is"
                assert tier.counts.corrupt == 1

    @pytest.mark.anyio
    @pytest.mark.parametrize("item", LIES.values(), ids=LIES)
    async def test_lengths_that_cannot_be(self, ctx: TierContext, item: wire.Item) -> None:
        def answer(sock: socket.socket, message: wire.Message) -> None:
            sock.sendall(wire.message(Kind.ITEM, message.number, wire.pack(item)))
            sock.sendall(bytes(SIZE))

        with self.false(answer) as server:
            async with self.asking(server.url, ctx) as tier:
                reads = [Read(key_of(1), 4)]
                with pytest.raises(TierDown):
                    await tier.read(reads)
                assert reads[0].object is None

    @pytest.mark.anyio
    @pytest.mark.parametrize("seed", range(8))
    async def test_answers_that_are_noise(self, ctx: TierContext, seed: int) -> None:
        """Mutated answers to every question: TierDown or data, never another error."""
        rng = random.Random(seed)
        kinds = {Kind.HAS: Kind.HAD, Kind.GET: Kind.ITEM, Kind.PUT: Kind.GRANT}

        def answer(sock: socket.socket, message: wire.Message) -> None:
            body = {
                Kind.HAS: bytes(2), Kind.PUT: bytes([wire.SEND]),
                Kind.GET: wire.pack(wire.Item(0, 3, SIZE, 0, SIZE)) + bytes(SIZE),
            }.get(message.kind, wire.pack(wire.Holdings(1, 1, 1, 1, 1)))  # fmt: skip
            kind = kinds.get(message.kind, Kind.HOLDS)
            raw = wire.message(kind, message.number, body)
            sock.sendall(next(mutations(raw[:100], 1, rng.randrange(1 << 30))) + raw[100:])
            if rng.random() < 0.3:
                sock.close()

        with self.false(answer) as server:
            async with self.asking(server.url, ctx) as tier:
                for _ in range(40):
                    for ask in (
                        lambda: tier.exists([key_of(1), key_of(2)]), lambda: self.get(tier, 1),
                        lambda: self.put(tier, 1), lambda: tier.delete([key_of(1)]),
                    ):  # fmt: skip
                        with contextlib.suppress(TierDown, OSError, TimeoutError):
                            with anyio.fail_after(0.2):
                                await ask()

    @pytest.mark.anyio
    async def test_no_byte_lands_in_memory_that_was_given_back(
        self, ctx: TierContext, arena: Arena, whole: bytes
    ) -> None:
        """A read is cancelled in the middle of an object; the rest comes later, and nowhere."""
        half, leased = anyio.Event(), threading.Event()
        sent: list[int] = []
        token = anyio.lowlevel.current_token()

        def answer(sock: socket.socket, message: wire.Message) -> None:
            item = wire.pack(wire.Item(0, 3, SIZE, 0, SIZE))
            sock.sendall(wire.message(Kind.ITEM, message.number, item) + whole[: SIZE // 2])
            anyio.from_thread.run_sync(half.set, token=token)
            assert leased.wait(30)
            with contextlib.suppress(OSError):
                sock.sendall(whole[SIZE // 2 :])
            sent.append(1)

        with self.false(answer) as server:
            async with self.asking(server.url, ctx) as tier:
                for _ in range(3):
                    leased.clear()
                    async with anyio.create_task_group() as group:
                        reads = [Read(key_of(1), ALL)]
                        group.start_soon(tier.read, reads)
                        await half.wait()
                        await anyio.sleep(0.01)
                        group.cancel_scope.cancel()
                    half = anyio.Event()
                    assert reads[0].object is None
                    assert arena.leases == 0
                    lease = arena.lease(arena.working)  # whatever is given back is in it
                    lease.view[:] = b"\xa5" * lease.nbytes
                    count = len(sent)
                    leased.set()
                    while len(sent) == count:  # noqa: ASYNC110 - by another thread
                        await anyio.sleep(0.01)
                    await anyio.sleep(0.05)
                    assert bytes(lease.view) == b"\xa5" * lease.nbytes
                    lease.release()

    @pytest.mark.anyio
    async def test_an_endless_answer_takes_no_memory(self, ctx: TierContext) -> None:
        def answer(sock: socket.socket, message: wire.Message) -> None:
            head = wire.HEAD.pack(b"TW", 1, Kind.HAD, message.number, 0xFFFFFFFF, 0)
            sock.sendall(head + bytes(1 << 20))

        with self.false(answer) as server:
            async with self.asking(server.url, ctx) as tier:
                gc.collect()
                before = resident()
                for _ in range(20):
                    with pytest.raises(TierDown, match="at most"):
                        await tier.exists([key_of(1)])
                assert resident() - before < 64 << 20

    @pytest.mark.anyio
    async def test_memory_that_could_be_cut_is_not_mapped(
        self, ctx: TierContext, tmp_path: Path
    ) -> None:
        """A server that shares an unsealed file could kill us by truncating it."""
        path = tmp_path / "false"
        code = FALSE_MEMORY.format(path=str(path))
        server = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-c", code], stdout=subprocess.PIPE
        )
        try:
            assert server.stdout is not None
            server.stdout.readline()
            tier = Server(ServerOptions(url=f"tierloom+unix://{path}"), ctx)
            await tier.open()
            with pytest.raises(TierDown, match="not sealed"):
                await tier.read([Read(key_of(1), ALL)])
            await tier.close()
        finally:
            server.kill()
            server.wait()
            if server.stdout is not None:
                server.stdout.close()


FALSE_MEMORY = """
import os, socket, threading
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.protocol import Kind
fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
os.ftruncate(fd, 1 << 20)
listener = socket.socket(socket.AF_UNIX)
listener.bind({path!r})
listener.listen()
print("ready", flush=True)
def serve(sock):
    nonce, epoch = bytes(32), bytes(16)
    greeting = wire.pack(wire.Greeting(1, 1, False, epoch, nonce))
    sock.sendall(wire.message(Kind.GREETING, 0, greeting))
    hello = wire.unpack(wire.Hello, sock.recv(4096)[16:])
    proof = wire.proof(b"", b"server", epoch, nonce, hello.nonce, hello.namespace)
    flags = hello.flags & wire.MEMORY
    welcome = wire.pack(wire.Welcome(flags, proof, 1 << 20, 1 << 20, 1 << 20))
    words = wire.message(Kind.WELCOME, 0, welcome)
    socket.send_fds(sock, [words], [fd] if flags else [])
    while sock.recv(4096):
        holds = wire.pack(wire.Holdings(0, 0, 0, 0, 0))
        sock.sendall(wire.message(Kind.HOLDS, 1, holds))
while True:
    threading.Thread(target=serve, args=[listener.accept()[0]], daemon=True).start()
"""


def test_a_wrong_token_is_refused_and_never_told(tmp_path: Path, caplog: Any) -> None:
    made = Within(tmp_path / "socket", token=b"right and secret")
    for url in made.urls:
        with connected(url) as sock:
            refusal = greet(sock, token=b"wrong")
            assert refusal.kind is Kind.ERROR
            assert wire.error_of(refusal.body) == (wire.ErrorCode.TOKEN, "wrong token")
            assert is_closed(sock)
        with connected(url) as sock:
            assert greet(sock).kind is Kind.ERROR
        with connected(url) as sock:
            assert greet(sock, token=b"right and secret").kind is Kind.WELCOME
    made.stop()
    assert "secret" not in caplog.text
