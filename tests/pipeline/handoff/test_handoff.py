"""Prefill at one engine, decode at another: what is promised, what lands, and what does not."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from conftest import Engine, config, settle, tokens
from trips import get, until

from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.config.problems import ConfigProblems
from tierloom.pipeline.handoff.handoff import ticket_of
from tierloom.pipeline.handoff.promises import Promises
from tierloom.stages.kv.prefix import Chain
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.taking import PieceHead, Take

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from conftest import Open

    from tierloom import Pipeline

IDS = tokens(192)
TICKET = ticket_of("a request")


def prefiller(**changes: Any) -> dict[str, Any]:
    return config(serve={"tiers": ["hot"]} | changes.pop("serve", {}), **changes)


def decoder(**changes: Any) -> dict[str, Any]:
    handoff = {"peers": ["127.0.0.1"], "wait": "20 s"} | changes.pop("handoff", {})
    return config(handoff=handoff, **changes)


def chunks_of(pipe: Pipeline, ids: np.ndarray = IDS) -> list[bytes]:
    """Grain links of each chunk."""
    chain = Chain(pipe.names.digest, 16)
    chain.extend(ids)
    return [b"".join(chain.links[i : i + 4]) for i in range(0, len(chain.links), 4)]


def keys_of(pipe: Pipeline, ids: np.ndarray = IDS) -> list[bytes]:
    return [links[-32:] for links in chunks_of(pipe, ids)]


def promise(pipe: Any, ids: np.ndarray = IDS, ticket: bytes = TICKET) -> None:
    """Until it is open."""
    pipe.handoff.promise(ticket, chunks_of(pipe, ids))
    pipe._portal.call(_nothing)


async def _nothing() -> None:
    pass


def begin_land(
    pipe: Any, at: Any, ids: np.ndarray = IDS, ticket: bytes = TICKET, *, later: bool = False
) -> Any:
    host, port = at.serves_at.removeprefix("tierloom://").split(":") if at else ("127.0.0.1", 1)
    return pipe.handoff.land(host, int(port), ticket, chunks_of(pipe, ids), later=later)


def land(pipe: Any, at: Any, ids: np.ndarray = IDS, ticket: bytes = TICKET) -> int:
    came: int = begin_land(pipe, at, ids, ticket).result(30)
    settle(pipe)
    return came


def test_what_is_promised_lands_and_stays(opened: Open) -> None:
    engine = Engine()
    at = engine.slots(192)
    p, d = opened(prefiller(), engine), opened(decoder(), engine)
    promise(p)
    assert p.store(IDS, engine.caches, at).wait().lost == {}
    settle(p)
    assert p.stats()["handoff"]["tickets"] == 1
    assert p.stats()["handoff"]["pinned"] > 0
    assert land(d, p) == 3
    until(lambda: p.stats()["handoff"] == {"tickets": 0, "pinned": 0})
    assert land(d, p) == 0  # it is here
    p.close()
    got = get(d, engine, at)
    assert (got.tokens, got.tiers, got.lost) == (192, {"hot": 3}, {})


def test_who_asks_early_waits_for_what_is_promised(opened: Open) -> None:
    """Before the ticket, and before anything is stored."""
    engine = Engine()
    at = engine.slots(192)
    p, d = opened(prefiller(), engine), opened(decoder(), engine)
    landing = begin_land(d, p, later=True)
    until(lambda: p.stats()["serve"]["clients"] == 1)
    promise(p)
    p.store(IDS[:64], engine.caches, at[:64]).wait()
    until(lambda: d.stats()["tiers"]["hot"]["objects"] == 1)
    assert not landing.done()
    p.store(IDS, engine.caches, at).wait()
    assert landing.result(30) == 3
    assert get(d, engine, at).tokens == 192


def test_a_ticket_that_is_unknown_is_a_miss_at_once_but_names_still_find(opened: Open) -> None:
    engine = Engine()
    at = engine.slots(192)
    p, d = opened(prefiller(), engine), opened(decoder(handoff={"wait": "60 s"}), engine)
    assert land(d, p) == 0
    p.store(IDS, engine.caches, at).wait()
    assert land(d, p, ticket=ticket_of("another's")) == 3
    assert d.stats()["handoff"]["given_up"] == 1


def test_a_chunk_that_lies_in_a_longer_one_lands_with_it(opened: Open) -> None:
    engine = Engine()
    at = engine.slots(192)
    p, d = opened(prefiller(), engine), opened(decoder(), engine)
    p.store(IDS, engine.caches, at).wait()
    promise(p, IDS[:160])
    p.store(IDS[:160], engine.caches, at[:160]).wait()  # its last chunk is the head of one there
    assert land(d, p, IDS[:160]) == 3
    assert get(d, engine, at[:160], IDS[:160]).tokens == 160
    assert land(d, p, IDS[:144]) == 0  # here, in a longer one


@pytest.mark.parametrize("short", ["arena", "tier"])
def test_a_full_decoder_takes_a_prefix_and_waits_for_nothing(opened: Open, short: str) -> None:
    engine = Engine(blocks=4000)
    ids = tokens(64 * 200)
    at = engine.slots(len(ids))
    small = {"budget__arena": "1 MiB"} if short == "arena" else {"tiers__hot__capacity": "1 MiB"}
    p, d = opened(prefiller(), engine), opened(decoder(**small), engine)
    promise(p, ids)
    p.store(ids, engine.caches, at).wait(60)
    came = land(d, p, ids)
    assert 0 < came < 200
    got = d.retrieve(ids, engine.blank().caches, at).wait()
    assert got.tokens == 64 * came
    busy = d.arena.lease(d.arena.working - 4096)  # no room at all
    d._portal.call(d.arena.promises.reserve, d.arena.working)
    assert land_now(d, p, tokens(192, seed=8)) == 0
    d._portal.post(d.arena.promises.unreserve, d.arena.working)
    busy.release()


def land_now(pipe: Any, at: Any, ids: np.ndarray) -> int:
    came: int = begin_land(pipe, at, ids).result(30)
    return came


def test_many_at_once_where_there_is_room_for_few(opened: Open) -> None:
    """Each takes what fits and is over; nobody waits for anybody's room."""
    engine = Engine(blocks=800)
    p = opened(prefiller(), engine)
    d = opened(decoder(budget__arena="1 MiB", tiers__hot__capacity="1 MiB"), engine)
    asked = [tokens(384, seed=seed) for seed in range(16)]
    for ids in asked:
        assert p.store(ids, engine.caches, engine.slots(384)).wait().lost == {}
    for _ in range(20):
        landings = [begin_land(d, p, ids) for ids in asked]
        came = [landing.result(20) for landing in landings]
        assert max(came) == 6
        settle(d)
        d.clear()
    assert d.stats()["handoff"]["landing"] == 0


def test_pins_take_half_of_the_tier_and_end(opened: Open) -> None:
    engine = Engine(blocks=4000)
    p = opened(
        prefiller(serve={"ticket": "60 s"}, tiers__hot__capacity="1 MiB"), engine
    )  # fmt: skip
    kept = [tokens(640, seed=seed) for seed in range(8)]
    for i, ids in enumerate(kept):
        promise(p, ids, ticket_of(str(i)))
        assert p.store(ids, engine.caches, engine.slots(640)).wait().lost == {}
    said = p.stats()["handoff"]
    assert 0 < said["pinned"] <= 1 << 19
    promised = p.lookup(kept[0])
    for seed in range(20, 60):  # evicts all that is not pinned
        p.store(tokens(640, seed=seed), engine.caches, engine.slots(640)).wait()
    assert p.lookup(kept[0]) == promised == 640
    for i in range(8):
        p.handoff.release(ticket_of(str(i)))
    for seed in range(60, 90):
        p.store(tokens(640, seed=seed), engine.caches, engine.slots(640)).wait()
    assert p.lookup(kept[0]) == 0
    assert p.stats()["handoff"] == {"tickets": 0, "pinned": 0}


def test_a_ticket_ends_some_time_after_its_last_chunk_came(opened: Open) -> None:
    engine = Engine()
    p = opened(prefiller(serve={"ticket": "200 ms"}), engine)
    promise(p)
    p.store(IDS, engine.caches, engine.slots(192)).wait()
    until(lambda: p.stats()["handoff"] == {"tickets": 0, "pinned": 0})
    now = 0.0
    promises = Promises([p.tiers["hot"]], 30.0, clock=lambda: now)
    first, *_, last = chunks_of(p)
    promises.open(TICKET, [first, last])
    now = 29.0
    assert promises.expire() == 1.0
    promises.note(last)
    now = 58.0
    assert promises.expire() == 1.0
    assert promises.pinned
    now = 59.0
    assert (promises.expire(), promises.pinned, len(promises)) == (None, 0, 0)


def test_tickets_end_when_they_are_released_or_all_is_forgotten(opened: Open) -> None:
    engine = Engine()
    p = opened(prefiller(), engine)
    for name in "abc":
        promise(p, ticket=ticket_of(name))
    promise(p, ticket=ticket_of("a"))  # twice
    p.store(IDS, engine.caches, engine.slots(192)).wait()
    pinned = p.stats()["handoff"]["pinned"]
    p.handoff.release(ticket_of("a"))
    p.handoff.release(ticket_of("unknown"))
    until(lambda: p.stats()["handoff"] == {"tickets": 2, "pinned": pinned})
    p.clear()
    assert p.stats()["handoff"] == {"tickets": 0, "pinned": 0}
    settle(p)


@pytest.mark.parametrize(
    ("peers", "token", "port", "comes"),
    [
        (["127.0.0.1"], "", True, 3), (["127.0.0.1:1, 10.0.0.7"], "", True, 0), ([], "", True, 0),
        ([], "right", True, 3), ([], "wrong", True, 0), (["127.0.0.1"], "wrong", True, 0),
        (["127.0.0.1"], "", False, 0),
    ],
)  # fmt: skip
def test_only_who_is_named_or_proves_the_token_is_dialed(
    opened: Open, tmp_path: Path, peers: list[str], token: str, port: bool, comes: int
) -> None:
    engine = Engine()
    at = engine.slots(192)
    files = {}
    for word in {"right", "wrong"} if token else ():
        files[word] = tmp_path / word
        files[word].write_text(word)
        files[word].chmod(0o600)
    guarded = {"token_file": str(files["right"])} if token else {}
    p = opened(prefiller(serve=guarded), engine)
    more = {"token_file": str(files[token])} if token else {}
    d = opened(decoder(handoff={"peers": peers} | more), engine)
    p.store(IDS, engine.caches, at).wait()
    assert land(d, p if port else None) == comes
    assert get(d, engine, at).tokens == 64 * comes


class Liar:
    """A listener that welcomes, and answers every TAKE with what it is told to."""

    def __init__(self, answer: Callable[[socket.socket, int, Take], None]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.serves_at = f"tierloom://127.0.0.1:{self._listener.getsockname()[1]}"
        self._answer, self.asked = answer, 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock:
                epoch, nonce = bytes(16), bytes(32)
                greeting = wire.Greeting(wire.VERSION, wire.VERSION, False, epoch, nonce)
                sock.sendall(wire.message(wire.Kind.GREETING, 0, wire.pack(greeting)))
                hello = wire.unpack(wire.Hello, _read(sock).body)
                proof = wire.proof(b"", b"server", epoch, nonce, hello.nonce, hello.namespace)
                welcome = wire.Welcome(0, proof, 1 << 26, 1 << 26, 0)
                sock.sendall(wire.message(wire.Kind.WELCOME, 0, wire.pack(welcome)))
                message = _read(sock)
                self.asked += 1
                self._answer(sock, message.number, Take.unpack(message.body))

    def close(self) -> None:
        self._listener.close()


def _read(sock: socket.socket) -> wire.Message:
    kind, number, length = wire.head(_exactly(sock, wire.HEAD.size))
    return wire.Message(kind, number, _exactly(sock, length))


def _exactly(sock: socket.socket, nbytes: int) -> bytes:
    got = b""
    while len(got) < nbytes and (piece := sock.recv(nbytes - len(got))):
        got += piece
    return got


@pytest.mark.parametrize(
    "lie",
    ["frame", "header", "another", "another prompt", "short", "long", "twice", "index", "order",
     "code", "garbage", "silence", "cut", "halves", "lengths"],
)  # fmt: skip
def test_what_a_liar_sends_is_a_miss_and_then_it_is_left_alone(opened: Open, lie: str) -> None:
    engine = Engine()
    at = engine.slots(192)
    p, d = opened(prefiller(), engine), opened(decoder(handoff={"wait": "500 ms"}), engine)
    other = tokens(192, seed=4)
    for ids in (IDS, other):
        p.store(ids, engine.caches, at).wait()
    keys, others = keys_of(p), keys_of(p, other)

    def whole(key: bytes) -> bytes:
        obj = p.tiers["hot"].hold(key)
        assert obj is not None
        raw = bytes(obj.lease.view[: obj.header.nbytes])
        obj.lease.release()
        return raw

    def answer(sock: socket.socket, number: int, take: Take) -> None:
        def say(index: int, raw: bytes, nbytes: int = 0, begin: int = 0, code: int = 0) -> None:
            piece = PieceHead(index, code, nbytes or len(raw), begin, begin + len(raw))
            sock.sendall(wire.message(wire.Kind.PIECE, number, piece.pack()) + raw)

        first = bytearray(whole(keys[0]))
        say(0, bytes(first))  # right, and is kept
        raw = bytearray(whole(keys[1]))
        end = 4096
        if lie == "frame":
            raw[5000] ^= 1
        elif lie == "header":
            raw[60] ^= 1
        elif lie == "another":
            raw = first
        elif lie == "another prompt":
            raw = bytearray(whole(others[1]))
        elif lie == "short":
            raw = raw[:-4096]
        elif lie == "long":
            raw += bytes(4096)
        elif lie == "twice":
            say(0, bytes(first))
        elif lie == "index":
            say(77, bytes(raw))
        elif lie == "order":
            say(1, bytes(raw[8192:]), len(raw), 8192)
            say(1, bytes(raw[4096:8192]), len(raw), 4096)
        elif lie == "code":
            say(1, b"", code=99)
        elif lie == "garbage":
            sock.sendall(bytes(range(256)) * 64)
        elif lie == "silence":
            time.sleep(1.5)
            return
        elif lie == "cut":
            piece = PieceHead(1, nbytes=len(raw), end=len(raw))
            sock.sendall(wire.message(wire.Kind.PIECE, number, piece.pack()) + raw[:6000])
            return
        elif lie == "halves":  # in order, but the header is another's
            say(1, bytes(raw[end:]), len(raw), end)
            say(1, whole(others[1])[:end], len(raw))
        elif lie == "lengths":
            say(1, bytes(raw[end:]), len(raw), end)
            say(1, bytes(raw[:end]), len(raw) + 4096)
        if lie not in ("order", "halves", "lengths"):
            say(1, bytes(raw))

    liar = Liar(answer)
    try:
        assert begin_land(d, liar).result(20) == 1
        settle(d)
        assert get(d, engine, at).tokens == 64
        assert begin_land(d, liar).result(20) == 0
        assert liar.asked == 1
    finally:
        liar.close()


def test_what_comes_in_pieces_with_the_header_last_is_kept(opened: Open) -> None:
    engine = Engine()
    at = engine.slots(192)
    p, d = opened(prefiller(), engine), opened(decoder(), engine)
    p.store(IDS, engine.caches, at).wait()

    def answer(sock: socket.socket, number: int, take: Take) -> None:
        held = [p.tiers["hot"].hold(key) for key in take.keys]
        bounds = held[0].header.boundaries
        spans = [*itertools.pairwise(bounds), (0, bounds[0])]
        for begin, end in spans:  # layer group by layer group, as a prefiller computes them
            for i, obj in enumerate(held):
                piece = PieceHead(i, nbytes=obj.header.nbytes, begin=begin, end=end)
                message = wire.message(wire.Kind.PIECE, number, piece.pack())
                sock.sendall(message + bytes(obj.lease.view[begin:end]))
        for obj in held:
            obj.lease.release()
        sock.recv(1)

    liar = Liar(answer)
    try:
        assert begin_land(d, liar).result(20) == 3
        assert get(d, engine, at).tokens == 192
    finally:
        liar.close()
    settle(p)


def test_one_that_is_given_up_leaves_nothing(opened: Open) -> None:
    engine = Engine()
    p, d = opened(prefiller(), engine), opened(decoder(), engine)
    promise(p)
    landing = begin_land(d, p)
    until(lambda: d.stats()["handoff"]["landing"] == 1)
    landing.cancel()
    until(lambda: d.stats()["handoff"]["landing"] == 0)
    settle(d)
    until(lambda: p.stats()["handoff"] == {"tickets": 0, "pinned": 0})


def test_mistakes_in_a_file(tmp_path: Path) -> None:
    for options in ({"wait": 2}, {"peers": ["a:b:c"]}, {"connections": 0}, {"tls": "perhaps"}):
        with pytest.raises(ConfigProblems):
            load_config(decoder(handoff=options))
    with pytest.raises(ConfigProblems, match="ticket must be positive"):
        load_config(prefiller(serve={"ticket": "0 s"}))


def came(pipe: Any, nbytes: int) -> bool:
    return bool(pipe.stats()["handoff"]["bytes"] >= nbytes)


@pytest.mark.parametrize("steps", [1, 3])
def test_layers_go_out_as_they_are_computed(opened: Open, steps: int) -> None:
    """All frames but the last layer group's are at the decoder before that is computed."""
    engine = Engine()
    at = engine.slots(192)
    p = opened(prefiller(graphs__store__pace__by="layer"), engine)
    d = opened(decoder(), engine)
    landing = begin_land(d, p, later=True)
    promise(p)
    per = 192 // steps
    for end in range(per, 193, per):
        store = p.begin_store(IDS[:end], engine.caches, at[:end])
        for layer in range(engine.layers):
            if layer == engine.layers - 2 and end == 192:
                g = p.geometry
                least = g.frame_bytes(2, 64) * 2 * (per // 64)
                until(partial(came, d, least))
                assert not landing.done()
            store.layer_done(layer)
        assert store.wait().lost == {}
    assert landing.result(30) == 3
    settle(p)
    assert get(d, engine, at).tokens == 192
    until(lambda: p.stats()["handoff"] == {"tickets": 0, "pinned": 0})


def test_a_store_that_is_given_up_half_way_is_a_miss(opened: Open) -> None:
    engine = Engine()
    at = engine.slots(192)
    p = opened(prefiller(graphs__store__pace__by="layer"), engine)
    d = opened(decoder(handoff={"wait": "500 ms"}), engine)
    landing = begin_land(d, p, later=True)
    promise(p)
    store = p.begin_store(IDS, engine.caches, at)
    store.layer_done(1)
    until(lambda: d.stats()["handoff"]["bytes"] > 0)
    store.cancel()
    assert landing.result(30) == 0
    settle(d)
    assert get(d, engine, at).tokens == 0
    p.handoff.release(TICKET)
    settle(p)
