"""peer: engines in processes of their own find what each other has computed, and lose no more than
that when one is killed, stopped, restarted or lies."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from buckets import Gate
from conftest import Engine, config, settle, tokens
from peer_process import EngineProcess, engine
from servers import Certificates
from trips import PATIENCE, until

from tierloom.pipeline.config.load import load_config, warnings
from tierloom.pipeline.config.problems import ConfigProblems
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.protocol import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import Open

    from tierloom import Pipeline

QUICK = {"timeout": "200 ms", "hedge": "20 ms", "probe": "50 ms"}
AMPLE = {"timeout": "20 s", "hedge": "20 s", "probe": "50 ms"}
"""Where nothing is to be late: a busy machine is no failure."""


def near(*addresses: str, hot: bool = False, **options: Any) -> dict[str, Any]:
    """A pipeline that reads of peers, behind memory of its own (`hot`) or with nothing before."""
    changes = {k: options.pop(k) for k in list(options) if "__" in k or k == "serve"}
    made = config(
        tiers__near={"use": "peer", "directory": list(addresses)} | AMPLE | options, **changes
    )
    made["graphs"]["retrieve"]["stages"]["fetch"] = {"use": "get", "promote": "hot"}
    if not hot:
        made["graphs"]["retrieve"]["stages"]["plan"] = {"use": "lookup", "tiers": ["near"]}
        del made["graphs"]["retrieve"]["stages"]["fetch"]["promote"]
    return made


def serving(**options: Any) -> dict[str, Any]:
    return config(serve={"tiers": ["hot"]} | options)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[EngineProcess]]:
    """Two engines, which both have prompt 1, and each of which has one of its own: 2 and 3."""
    with contextlib.ExitStack() as stack:
        made = []
        for seed in (2, 3):
            folder = tmp_path_factory.mktemp(f"other-{seed}")
            made.append(stack.enter_context(engine(folder, serving())))
            assert made[-1].stores(1) == made[-1].stores(seed) == 192
        yield made


@pytest.fixture
def whole(others: list[EngineProcess]) -> list[EngineProcess]:
    """Both of them, running and with what they had, whatever the test before did."""
    for seed, other in zip((2, 3), others, strict=True):
        other.resume()
        if other.child.poll() is not None:
            other.start()
            assert other.stores(1) == other.stores(seed) == 192
    return others


class Asker:
    """A pipeline over peers, whose engine holds what the others compute alike."""

    def __init__(self, opened: Open, source: dict[str, Any], **options: Any) -> None:
        self.engine = Engine()
        self.pipe: Pipeline = opened(source, self.engine, **options)
        self.tier: Any = self.pipe.tiers["near"].tier if "near" in self.pipe.tiers else None

    def get(self, seed: int, **options: Any) -> Any:
        """As the others stored it: each computes the same KV, at slots of its own."""
        ids = tokens(192, seed=seed)
        target = self.engine.blank()
        got = self.pipe.retrieve(ids, target.caches, SLOTS, **options).wait()
        settle(self.pipe)
        if got.tokens:
            came, kept = target.rows(SLOTS), self.engine.rows(STORED[seed])
            assert np.array_equal(came[:, :, : got.tokens], kept[:, :, : got.tokens]), "wrong bytes"
        return got

    def healthy(self) -> list[str]:
        return [h.options.url for h in self.tier.healthy]


def _slots() -> dict[int, np.ndarray]:
    """Where an engine of a process keeps the prompts that it stores in this order."""
    first, second = Engine(), Engine()
    return {
        1: first.slots(192), 2: first.slots(192), 3: (second.slots(192), second.slots(192))[1],
    }  # fmt: skip


STORED = _slots()
SLOTS = Engine(seed=9).slots(192)


def test_what_another_has_computed_is_found_there(opened: Open, whole: Any) -> None:
    asker = Asker(opened, near(*(o.url for o in whole)))
    for seed in (1, 2, 3):
        got = asker.get(seed)
        assert (got.tokens, got.tiers, got.lost) == (192, {"near": 3}, {})
    assert asker.get(4).tokens == 0
    figures: Any = asker.pipe.stats()["tiers"]["near"]
    assert (figures["hits"], figures["corrupt"], figures["objects"]) == (9, 0, 0)


def test_what_came_is_kept_here(opened: Open, whole: Any) -> None:
    asker = Asker(opened, near(whole[0].url, hot=True))
    assert asker.get(1).tiers == {"near": 3}
    assert asker.get(1).tiers == {"hot": 3}
    assert asker.pipe.lookup(tokens(192, seed=1)) == 192


def test_a_store_asks_no_peer(opened: Open, whole: Any) -> None:
    """That another has a chunk is no reason not to keep it here, and that none has is no work."""
    asker = Asker(opened, near(whole[0].url, hot=True))
    ids = tokens(192, seed=1)
    assert asker.pipe.store(ids, asker.engine.caches, SLOTS).wait().tiers == {"hot": 3}
    again = asker.pipe.store(tokens(192, seed=7), asker.engine.caches, SLOTS).wait()
    assert again.tiers == {"hot": 3}
    again = asker.pipe.store(tokens(192, seed=7), asker.engine.caches, SLOTS).wait()
    assert again.tiers == {}
    packed = asker.pipe.stats()["stages"]["store"]["pack"]["chunks"]
    assert packed == 6, "what is kept here is not gathered for others"


def test_another_model_finds_nothing(opened: Open, whole: Any) -> None:
    asker = Asker(opened, near(whole[0].url), model="another")
    assert asker.get(1).tokens == 0


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_the_next_has_it_when_one_is_gone(opened: Open, whole: Any, end: str) -> None:
    asker = Asker(opened, near(*(o.url for o in whole), **QUICK))
    until(lambda: len(asker.healthy()) == 2)
    for _ in range(3):
        assert asker.get(1).tokens == 192
    whole[0].kill() if end == "killed" else whole[0].pause()
    until(lambda: asker.get(1).tokens == 192 and len(asker.healthy()) == 1)
    for _ in range(3):
        assert asker.get(1).tokens == 192
        assert asker.get(2).tokens == 0, "nobody else has it"
    assert asker.pipe.tiers["near"].available
    assert asker.pipe.stats()["tiers"]["near"]["left_alone"] >= 1
    whole[0].start() if end == "killed" else whole[0].resume()
    until(lambda: len(asker.healthy()) == 2)
    if end == "killed":
        assert whole[0].stores(1) == whole[0].stores(2) == 192
    until(lambda: asker.get(2).tokens == 192)


def test_stopped_while_bytes_are_on_their_way(opened: Open, whole: Any) -> None:
    """Over and over at other moments: what comes late comes nowhere."""
    asker = Asker(opened, near(*(o.url for o in whole), **QUICK, graphs__retrieve__deadline="2 s"))
    rng = np.random.default_rng(3)
    for _ in range(12):
        until(lambda: len(asker.healthy()) == 2)
        victim = whole[int(rng.integers(2))]
        stopping = threading.Timer(float(rng.uniform(0, 0.004)), victim.pause)
        stopping.start()
        got = asker.get(1)
        stopping.join()
        assert got.tokens in (0, 64, 128, 192)
        victim.resume()


def test_restarts_leave_nothing_behind(opened: Open) -> None:
    """Each is another epoch; connections, threads and memory are those of the first."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    asker, ids, counts = Asker(opened, near(listen, **QUICK)), tokens(192, seed=1), []
    for _ in range(12):
        other = opened(serving(listen=listen), Engine())
        until(lambda: bool(asker.healthy()))
        other.store(ids, asker.engine.caches, STORED[1]).wait()
        until(lambda: asker.get(1).tokens == 192)
        settle(other)
        other.close()
        until(lambda: asker.get(1).tokens == 0 and not asker.healthy())
        counts.append((threading.active_count(), len(os.listdir("/proc/self/fd"))))
    for left in zip(*counts, strict=True):  # a probe may be under way
        assert min(left[-4:]) == min(left[:4]), counts
    assert asker.pipe.stats()["tiers"]["near"]["restarts"] == 11


def test_oneself_is_not_asked(opened: Open, whole: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    me = f"127.0.0.1:{port}"
    source = near(me, whole[0].url, hot=True, serve={"tiers": ["hot"], "listen": me})
    asker = Asker(opened, source)
    until(lambda: any(h.is_oneself for h in asker.tier.holders.values()))
    assert asker.healthy() == [whole[0].url]
    assert asker.get(2).tiers == {"near": 3}
    # A peer that names us in turn: what neither has is asked for once each, and is a miss.
    theirs = near(asker.pipe.serves_at, hot=True, serve={"tiers": ["hot"]})
    with engine(tmp_path, theirs) as third:
        mine = Asker(opened, near(third.url, me, hot=True))
        assert third.tell(retrieve=2, tokens=192) == {"tokens": 192, "tiers": {"near": 3}}
        assert third.tell(retrieve=8, tokens=192) == {"tokens": 0, "tiers": {}}
        assert mine.get(2).tokens == 192
        assert mine.get(8).tokens == 0


class Liar:
    """A peer that greets as it should, and then answers as it is told."""

    def __init__(
        self, answer: Callable[[wire.Message], bytes], version: int = wire.VERSION,
        *, silent: bool = False,
    ) -> None:  # fmt: skip
        """`silent`: it does not say what it has."""
        self._answer, self._version, self._silent = answer, version, silent
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._socks: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(10)
        self._listener.close()
        for sock in self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for sock in self._socks:
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._socks.append(sock)
                self._threads.append(threading.Thread(target=self._serve, args=[sock], daemon=True))
                self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError):
            nonce, epoch = bytes(32), b"e" * 16
            greeting = wire.Greeting(self._version, self._version, False, epoch, nonce)
            sock.sendall(wire.message(Kind.GREETING, 0, wire.pack(greeting)))
            hello = wire.unpack(wire.Hello, self._message(sock).body)
            proof = wire.proof(b"", b"server", epoch, nonce, hello.nonce, hello.namespace)
            welcome = wire.Welcome(0, proof, 1 << 20, 1 << 30, 0)
            sock.sendall(wire.message(Kind.WELCOME, 0, wire.pack(welcome)))
            while True:
                message = self._message(sock)
                if message.kind is Kind.PING:
                    sock.sendall(wire.message(Kind.PONG, message.number))
                elif message.kind is Kind.HAS and not self._silent:
                    keys = len(message.body) // 32
                    sock.sendall(wire.message(Kind.HAD, message.number, bytes(keys)))
                else:
                    sock.sendall(self._answer(message))

    def _message(self, sock: socket.socket) -> wire.Message:
        kind, number, length = wire.head(self._exactly(sock, wire.HEAD.size))
        return wire.Message(kind, number, self._exactly(sock, length))

    def _exactly(self, sock: socket.socket, nbytes: int) -> bytes:
        got = b""
        while len(got) < nbytes:
            piece = sock.recv(nbytes - len(got))
            if not piece:
                raise EOFError
            got += piece
        return got


def objects_of(opened: Open, seed: int, model: str = "test") -> dict[bytes, bytes]:
    """What an engine keeps of a prompt, by key."""
    rig = Engine()
    pipe = opened(config(), rig, model=model)
    pipe.store(tokens(192, seed=seed), rig.caches, rig.slots(192)).wait()
    entries: Any = pipe.tiers["hot"].tier._index  # type: ignore[attr-defined]
    found = {e.key: bytes(e.place.lease.view[: e.nbytes]) for e in entries}
    assert len(found) == 3
    return found


def answers(
    objects: dict[bytes, bytes], change: Callable[[bytes], bytes] = bytes, most: int = 99
) -> Callable[[wire.Message], bytes]:
    """What is asked for, else another one, changed; nothing behind `most` objects."""

    def answer(message: wire.Message) -> bytes:
        said = b""
        wanted = wire.unpack_all(wire.Wanted, message.body, wire.OBJECTS)
        for asked, another in list(zip(wanted, objects.values(), strict=False))[:most]:
            raw = change(objects.get(asked.key, another))
            item = wire.Item(0, min(asked.upto, 3), len(raw), 0, len(raw))
            said += wire.message(Kind.ITEM, message.number, wire.pack(item)) + raw
        return said

    return answer


LIES = ["garbage", "another model", "another chunk", "fewer bytes", "more bytes", "flipped", "no"]


@pytest.mark.parametrize("lie", LIES)
def test_a_peer_that_lies(opened: Open, whole: Any, lie: str) -> None:
    """A miss, and no reason to leave the others alone; the next peer has the true one."""
    model = "another" if lie == "another model" else "test"
    objects = objects_of(opened, 5 if lie == "another chunk" else 1, model)
    tell: Callable[[wire.Message], bytes] = {
        "garbage": lambda message: os.urandom(4096),
        "fewer bytes": answers(objects, lambda raw: raw[:-4096]),
        "more bytes": answers(objects, lambda raw: raw + bytes(4096)),
        "flipped": answers(objects, lambda raw: raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:]),
        "no": lambda message: wire.message(Kind.ITEM, message.number, bytes(64)),
    }.get(lie, answers(objects))
    with contextlib.closing(Liar(tell)) as liar:
        asker = Asker(opened, near(liar.url, **QUICK))
        for _ in range(3):
            assert asker.get(1).tokens == 0
        assert asker.pipe.tiers["near"].available
        assert not asker.pipe.tiers["near"].unread._until, "another may have the true one"
        both = Asker(opened, near(liar.url, whole[0].url, **QUICK))
        until(lambda: both.get(1).tokens == 192)
        until(lambda: both.get(2).tokens == 192)


def test_another_protocol_version_is_a_message(
    opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(Liar(lambda message: b"", version=2)) as liar:
        asker = Asker(opened, near(liar.url, **QUICK))
        until(lambda: "speaks protocol versions 2 to 2" in caplog.text)
        assert asker.get(1).tokens == 0
        assert caplog.text.count("protocol versions") == 1


def test_tls(
    opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is served over it is read by who trusts its authority, and by no other."""
    made = Certificates(tmp_path)
    cert, key = str(tmp_path / "server.crt"), str(tmp_path / "server.key")
    other = opened(serving(listen="tls://127.0.0.1:0", cert_file=cert, key_file=key), Engine())
    assert other.serves_at.startswith("tierloom+tls://127.0.0.1:")
    asker = Asker(opened, near(other.serves_at, ca_file=str(made.ca)))
    other.store(tokens(192, seed=1), asker.engine.caches, STORED[1]).wait()
    assert asker.get(1).tokens == 192
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    for options in ({"ca_file": str(made.other_ca)}, {}):
        caplog.clear()
        wrong = Asker(opened, near(other.serves_at, **options))
        until(lambda: "certificate verify failed" in caplog.text)
        assert wrong.get(1).tokens == 0
    caplog.clear()
    monkeypatch.setattr(socket, "getaddrinfo", _elsewhere(socket.getaddrinfo))
    named = other.serves_at.replace("127.0.0.1", "another.example")
    wrong = Asker(opened, near(named, ca_file=str(made.ca)))
    until(lambda: "Hostname mismatch" in caplog.text)
    assert wrong.get(1).tokens == 0


def _elsewhere(real: Callable[..., Any]) -> Callable[..., Any]:
    """A name service that knows one name more."""

    def getaddrinfo(host: Any, *more: Any, **options: Any) -> Any:
        return real("127.0.0.1" if host == "another.example" else host, *more, **options)

    return getaddrinfo


@pytest.mark.parametrize("given", ["none", "another"])
def test_a_wrong_token_is_a_message(
    opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture, given: str
) -> None:
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text("right")
    wrong.write_text("wrong")
    other = opened(serving(token_file=str(right)), Engine())
    files = {"none": "", "another": str(wrong)}
    asker = Asker(opened, near(other.serves_at, token_file=files[given], **QUICK))
    other.store(tokens(192, seed=1), asker.engine.caches, STORED[1]).wait()
    until(lambda: "cannot be read: the server" in caplog.text)
    assert asker.get(1).tokens == 0
    assert caplog.text.count("cannot be read") == 1
    true = Asker(opened, near(other.serves_at, token_file=str(right)))
    assert true.get(1).tokens == 192


def test_a_slow_peer_is_hedged(opened: Open, whole: Any) -> None:
    """One delivers a part of what it has, and then nothing: the other is asked beside it."""
    with contextlib.closing(Liar(answers(objects_of(opened, 1), most=1))) as liar:
        options = {"timeout": "20 s", "hedge": "300 ms", "graphs__retrieve__deadline": "20 s"}
        asker = Asker(opened, near(liar.url, whole[0].url, **options))
        asker.tier._size = 1 << 14  # as if objects had come before, from the other, slowly
        other = asker.tier.holders[whole[0].url]
        other.cost.add(1 << 20, 5.0)
        other._measured = time.monotonic()
        assert asker.get(1).tokens == 192


def test_who_is_slow_to_say_what_it_has(opened: Open, whole: Any) -> None:
    """Another has it all: that one is not waited for, nor by the next."""
    with contextlib.closing(Liar(lambda message: b"", silent=True)) as liar:
        options = {"timeout": "20 s", "hedge": "300 ms", "graphs__retrieve__deadline": "20 s"}
        asker = Asker(opened, near(liar.url, whole[0].url, **options))
        assert asker.get(1).tokens == 192
        assert asker.pipe.stats()["tiers"]["near"]["left_alone"] == 1


def test_a_question_does_not_wait_for_objects(opened: Open) -> None:
    """However many reads hang, another prompt is asked about, and the peer is not to blame."""
    with contextlib.closing(Liar(answers(objects_of(opened, 1), most=1))) as liar:
        options = {"timeout": "20 s", "graphs__retrieve__deadline": "20 s", "connections": 2}
        asker = Asker(opened, near(liar.url, **options))
        ids = tokens(192, seed=1)
        blanks = [asker.engine.blank() for _ in range(3)]
        hung = [asker.pipe.retrieve(ids, blank.caches, SLOTS) for blank in blanks]
        until(lambda: asker.tier.holders[liar.url].busy == 3)
        assert asker.pipe.begin_lookup(ids).result(10) == 192
        for ticket in hung:
            ticket.cancel()
            ticket.wait()


def test_what_nobody_may_put_into_is_told(opened: Open) -> None:
    made = near("127.0.0.1:1")
    made["graphs"]["store"]["stages"]["near"] = {"use": "put", "tier": "near"}
    with pytest.raises(ConfigProblems, match="tier 'near' is only read"):
        load_config(made)
    assert not [w for w in warnings(load_config(near("127.0.0.1:1", hot=True))) if "near" in w.path]
    spec = load_config(near("127.0.0.1:1", timeout="70 ms", probe="30 ms"))
    assert (spec.tiers["near"].options.timeout, spec.tiers["near"].options.probe) == (0.07, 0.03)
    assert spec.tiers["near"].breaker.timeout == 2.0, "that of all peers together"
    spec = load_config(near("127.0.0.1:1", timeout="3 s"))
    assert spec.tiers["near"].breaker.timeout == 15.0


def test_cut_off_while_bytes_are_on_their_way(opened: Open, whole: Any) -> None:
    """Somewhere in an answer the wire goes dead, for one of two, and comes back."""
    with contextlib.closing(Gate(int(whole[0].url.rpartition(":")[2]))) as gate:
        left = [0]

        def shut(data: bytes) -> bytes:
            left[0] -= len(data)
            if left[0] < 0:
                gate.open.clear()
            return data

        asker = Asker(opened, near(f"127.0.0.1:{gate.port}", whole[1].url, **QUICK))
        for after in (1, 100, 5_000, 40_000):
            until(lambda: len(asker.healthy()) == 2 and asker.get(2).tokens == 192)
            left[0], gate.change = after, shut
            until(lambda: not gate.open.is_set() or asker.get(2).tokens == 0)
            until(lambda: asker.get(1).tokens == 192 and len(asker.healthy()) == 1)
            assert asker.get(2).tokens == 0, "it is cut off"
            gate.change = None
            gate.open.set()


@pytest.mark.parametrize("end", ["never there", "stopped", "killed"])
def test_alone_with_one_that_is_gone(opened: Open, whole: Any, end: str) -> None:
    url = whole[0].url
    if end == "never there":
        with socket.create_server(("127.0.0.1", 0)) as free:
            url = f"127.0.0.1:{free.getsockname()[1]}"
    asker = Asker(opened, near(url, **QUICK, graphs__retrieve__deadline="300 ms"))
    if end != "never there":
        until(lambda: asker.get(1).tokens == 192)
        whole[0].kill() if end == "killed" else whole[0].pause()
    for _ in range(5):
        began = time.monotonic()
        assert asker.get(2).tokens == 0
        assert time.monotonic() - began < PATIENCE
    assert asker.healthy() == []
    assert asker.pipe.tiers["near"].available, "the tier is there: its peers are not"
