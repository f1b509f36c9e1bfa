"""The prefiller opens: it tells the decoder, which fetches, and then the proxy."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest
import zmq
from conftest import Engine, settle, tokens
from handing import IDS, TICKET, Liar, chunks_of, decoder, prefiller
from hypothesis import given, strategies as st
from trips import get, until

from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.config.problems import ConfigProblems
from tierloom.pipeline.handoff.handoff import ToldDecoder, ticket_of
from tierloom.pipeline.handoff.proxy_notice import pack_notice, unpack_notice
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.offering import HandoffOffer, OfferProgress
from tierloom.stages.tiers.server.taking import Take

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np
    from conftest import Open


@pytest.fixture(autouse=True)
def _nothing_broke(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What breaks is logged, and would cost but a miss."""
    yield
    assert not [r.getMessage() for r in caplog.get_records("call") if r.levelno >= logging.ERROR]


class Notes:
    """LMCache's proxy, as far as it listens."""

    def __init__(self, port: int = 0) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.bind(f"tcp://127.0.0.1:{port}")
        self.at = self._socket.getsockopt(zmq.LAST_ENDPOINT).decode().removeprefix("tcp://")

    def next(self, seconds: float = 20.0) -> str | None:
        """A request's name; None: nothing has come."""
        if not self._socket.poll(seconds * 1000):
            return None
        return unpack_notice(self._socket.recv())

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()


@pytest.fixture
def notes() -> Iterator[Notes]:
    with contextlib.closing(Notes()) as made:
        yield made


def telling(at: str, **changes: Any) -> dict[str, Any]:
    """A prefiller whose decoders a proxy names."""
    more = {"peers": ["127.0.0.1"], "wait": "2 s", "proxy": at} | changes.pop("handoff", {})
    return prefiller(handoff=more, **changes)


def offered(**changes: Any) -> dict[str, Any]:
    """A decoder that prefillers tell."""
    more = {"offers": True} | changes.pop("handoff", {})
    return decoder(handoff=more, serve={"tiers": ["hot"]} | changes.pop("serve", {}), **changes)


def receiver(d: Any, name: str = "17", notices: int = 1) -> ToldDecoder:
    host, port = d.serves_at.removeprefix("tierloom://").split(":")
    return ToldDecoder(host, int(port), name, notices)


def offer(p: Any, to: ToldDecoder, ids: np.ndarray = IDS, ticket: bytes = TICKET) -> None:
    p.handoff.promise(ticket, chunks_of(p, ids))
    p.handoff.offer(ticket, to, chunks_of(p, ids))


def over(p: Any) -> bool:
    """Nothing is held for anybody, or under way."""
    said = p.stats()["handoff"]
    return not (said["tickets"] or said["pinned"] or said["offers"])


def test_what_is_offered_is_fetched_while_it_is_computed(opened: Open, notes: Notes) -> None:
    """And the proxy is told when the request is answered and all is there, not before."""
    engine = Engine()
    at = engine.slots(192)
    p, d = opened(telling(notes.at), engine), opened(offered(), engine)
    offer(p, receiver(d))
    p.store(IDS[:64], engine.caches, at[:64]).wait()
    until(lambda: d.stats()["tiers"]["hot"]["objects"] == 1)
    p.store(IDS, engine.caches, at).wait()
    until(lambda: d.stats()["tiers"]["hot"]["objects"] == 3)
    assert notes.next(0.2) is None
    p.handoff.end_offer(TICKET, receiver(d))
    assert notes.next() == "17"
    until(lambda: over(p))
    assert p.stats()["handoff"]["taken"] == 1
    p.close()
    assert get(d, engine, at).tokens == 192


@pytest.mark.parametrize("notices", [1, 3])
def test_what_comes_too_late_is_offered_again(opened: Open, notes: Notes, notices: int) -> None:
    """A prompt may wait longer for its turn than a decoder waits for it. A decoder of several
    ranks has as many notes."""
    engine = Engine()
    at = engine.slots(192)
    p, d = opened(telling(notes.at), engine), opened(offered(handoff={"wait": "200 ms"}), engine)
    to = receiver(d, notices=notices)
    offer(p, to)
    until(lambda: d.stats()["handoff"]["given_up"] == 1)
    p.store(IDS, engine.caches, at).wait()
    assert not d.stats()["handoff"]["landed"]
    p.handoff.end_offer(TICKET, to)
    assert [notes.next() for _ in range(notices)] == ["17"] * notices
    assert get(d, engine, at).tokens == 192
    until(lambda: over(p))


def test_a_full_decoder_takes_what_fits(opened: Open, notes: Notes) -> None:
    engine = Engine(blocks=4000)
    ids = tokens(64 * 200)
    at = engine.slots(len(ids))
    p, d = opened(telling(notes.at), engine), opened(offered(budget__arena="1 MiB"), engine)
    offer(p, receiver(d), ids)
    p.store(ids, engine.caches, at).wait(60)
    p.handoff.end_offer(TICKET, receiver(d))
    assert notes.next() == "17"
    got = d.retrieve(ids, engine.blank().caches, at).wait()
    assert 0 < got.tokens < len(ids)
    until(lambda: over(p))
    assert not p.stats()["handoff"]["taken"]


@pytest.mark.parametrize("what", ["dead", "silent", "deaf", "old", "stranger", "no peer", "token"])
def test_the_proxy_is_told_whatever_the_decoder_does(
    opened: Open, notes: Notes, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine()
    secret = tmp_path / "token"
    secret.write_text("secret")
    secret.chmod(0o600)
    guarded = {"serve": {"token_file": str(secret)}} if what == "token" else {}
    peers = {"peers": ["10.0.0.7"]} if what == "no peer" else {}
    p = opened(telling(notes.at, handoff=peers), engine)
    other = {"handoff": {"offers": False}} if what == "old" else {}
    d = opened(offered(**guarded, **other), engine, model="else" if what == "stranger" else "test")
    to = receiver(d)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        if what == "silent":
            to = to._replace(port=mute.getsockname()[1])
        liar = Liar(lambda *_: time.sleep(2.5), flags=wire.OFFERS, read=bytes)
        to = receiver(liar) if what == "deaf" else to
        if what == "dead":
            d.close()
        offer(p, to)
        p.store(IDS, engine.caches, engine.slots(192)).wait()
        p.handoff.end_offer(TICKET, to)
        assert notes.next() == "17"
        liar.close()
    until(lambda: over(p))
    assert what == "dead" or not d.stats()["handoff"]["landed"]
    assert ("takes no offers" in caplog.text) == (what == "old"), (
        "it is not offered what it refuses"
    )


@pytest.mark.parametrize("lie", ["for ever", "count", "length", "kind", "number", "garbage"])
def test_a_decoder_that_lies_is_not_waited_for_longer_than_a_ticket_lives(
    opened: Open, notes: Notes, lie: str
) -> None:
    engine = Engine()

    def answer(sock: socket.socket, number: int, asked: HandoffOffer) -> None:
        kind, body = wire.Kind.OFFERED, OfferProgress(False, 0).pack()
        if lie == "for ever":
            with contextlib.suppress(OSError):
                while True:
                    said = OfferProgress(True, 0).pack()
                    sock.sendall(wire.message(kind, number, said))
                    time.sleep(0.05)
            return
        if lie == "count":
            body = OfferProgress(False, 4).pack()
        if lie == "length":
            body += b"\0"
        if lie == "kind":
            kind = wire.Kind.PONG
        number += lie == "number"
        sock.sendall(b"?" * 64 if lie == "garbage" else wire.message(kind, number, body))

    liar = Liar(answer, flags=wire.OFFERS, read=HandoffOffer.unpack)
    try:
        p = opened(telling(notes.at, serve={"ticket": "500 ms"}), engine)
        offer(p, receiver(liar))
        until(lambda: liar.asked == 1)
        p.handoff.end_offer(TICKET, receiver(liar))
        assert notes.next() == "17"
        until(lambda: over(p))
        assert not p.stats()["handoff"]["taken"]
    finally:
        liar.close()


@pytest.mark.parametrize("how", ["given up", "reset", "closed"])
def test_one_that_does_not_come_to_its_end(opened: Open, notes: Notes, how: str) -> None:
    """A request that is given up is nobody's; what is forgotten is computed, and the proxy told."""
    engine = Engine()
    p, d = opened(telling(notes.at), engine), opened(offered(), engine)
    offer(p, receiver(d))
    until(lambda: d.stats()["handoff"]["landing"] == 1)
    if how == "given up":
        p.handoff.release(TICKET)
        until(lambda: over(p))
    elif how == "reset":
        p.clear()
        assert notes.next(0.3) is None
        p.handoff.end_offer(TICKET, receiver(d))
    else:
        p.close()
    assert notes.next(5.0 if how == "reset" else 0.3) == ("17" if how == "reset" else None)
    until(lambda: d.stats()["handoff"]["landing"] == 0)


def test_a_request_of_which_nothing_was_promised(opened: Open, notes: Notes) -> None:
    """Too short for a name, or one that is not to be saved."""
    p = opened(telling(notes.at), Engine())
    to = ToldDecoder("127.0.0.1", 1, "short", 1)
    p.handoff.end_offer(b"", to)
    assert notes.next() == "short"
    p.handoff.promise(TICKET, [])
    p.handoff.offer(TICKET, to, [])
    p.handoff.end_offer(TICKET, to._replace(request="shorter"))
    assert notes.next() == "shorter"
    until(lambda: over(p))


def test_a_proxy_that_is_restarted_gets_no_note_of_the_one_before(opened: Open) -> None:
    """It counts its requests from one again."""
    first = Notes()
    port = int(first.at.rpartition(":")[2])
    p = opened(telling(first.at, handoff={"wait": "300 ms"}), Engine())
    p.handoff.end_offer(b"", ToldDecoder("127.0.0.1", 1, "a", 1))
    assert first.next() == "a"
    first.close()
    time.sleep(0.1)
    p.handoff.end_offer(b"", ToldDecoder("127.0.0.1", 1, "b", 1))
    time.sleep(0.5)
    with contextlib.closing(Notes(port)) as second:
        until(lambda: not p.handoff._offers._telling)
        until(lambda: p.handoff._offers._notices._socket.poll(0, zmq.POLLOUT))
        p.handoff.end_offer(b"", ToldDecoder("127.0.0.1", 1, "c", 1))
        assert second.next() == "c"


def test_many_at_once_to_a_decoder_with_little_room(opened: Open, notes: Notes) -> None:
    """All are told of, and all that was held is given back."""
    engine = Engine(blocks=800)
    p = opened(telling(notes.at), engine)
    d = opened(offered(budget__arena="1 MiB", tiers__hot__capacity="1 MiB"), engine)
    asked = {str(seed): tokens(384, seed=seed) for seed in range(16)}
    for name, ids in asked.items():
        offer(p, receiver(d, name), ids, ticket_of(name))
        p.store(ids, engine.caches, engine.slots(384))
    for name in asked:
        p.handoff.end_offer(ticket_of(name), receiver(d, name))
    assert {notes.next() for _ in asked} == asked.keys()
    until(lambda: over(p))
    settle(d)


def test_who_offers_cannot_have_a_stranger_dialed(opened: Open) -> None:
    """Nor say what makes no sense."""
    engine = Engine()
    d = opened(offered(), engine)
    p = opened(telling("127.0.0.1:1"), engine)
    good = HandoffOffer(TICKET, "192.0.2.1", 7, chunks_of(p))
    body = good.pack()
    assert _said(d, p, body) == OfferProgress(False, 0)
    assert d.stats()["handoff"]["landing"] == 0
    for bad in (b"", body[:40], body[:-1], body[:49], good._replace(port=0).pack(),
                good._replace(host="a\nb").pack(), good._replace(host="").pack()):  # fmt: skip
        assert _said(d, p, bad) is None
    other = opened(telling("127.0.0.1:1"), engine, model="else")
    other.store(IDS, engine.caches, engine.slots(192)).wait()
    at = other.serves_at.rpartition(":")[2]  # it may be dialed, and what it has is of no use
    mine = HandoffOffer(TICKET, "127.0.0.1", int(at), chunks_of(p)).pack()
    assert _said(d, other, mine) == OfferProgress(False, 0)
    assert d.stats()["handoff"]["bytes"] == 0
    assert _said(opened(offered(handoff={"offers": False}), engine), p, body) is None


def _said(d: Any, p: Any, body: bytes) -> OfferProgress | None:
    """The answer to an OFFER by one of p's model; None: the connection is closed."""
    host, port = d.serves_at.removeprefix("tierloom://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock, sock.makefile("rb") as f:

        def message() -> tuple[wire.Kind, bytes]:
            kind, _, length = wire.head(f.read(wire.HEAD.size))
            return kind, f.read(length)

        greeting = wire.unpack(wire.Greeting, message()[1])
        space, nonce = p.names.digest, bytes(32)
        proof = wire.proof(b"", b"client", greeting.epoch, greeting.nonce, nonce, space)
        hello = wire.Hello(wire.VERSION, 0, space, nonce, proof)
        sock.sendall(wire.message(wire.Kind.HELLO, 0, wire.pack(hello)))
        welcome = wire.unpack(wire.Welcome, message()[1])
        assert bool(welcome.flags & wire.OFFERS) == d.spec.handoff.offers
        sock.sendall(wire.message(wire.Kind.OFFER, 1, body))
        kind, answer = message()
        return None if kind is wire.Kind.ERROR else OfferProgress.unpack(answer, 3)


def test_a_prompt_that_is_too_long_for_a_message_is_offered_up_to_there() -> None:
    chunks = [bytes([i % 251]) * 256 for i in range(2000)]
    made = HandoffOffer.unpack(HandoffOffer(TICKET, "h", 1, chunks).pack())
    assert len(made.pack()) <= wire.BODY
    assert 1000 < len(made.chunks) < 2000
    assert made.chunks == chunks[: len(made.chunks)]
    short = HandoffOffer(TICKET, "h", 1, [*chunks[:2], b"x" * 32])
    assert HandoffOffer.unpack(short.pack()) == short


@given(st.binary(max_size=400))
def test_messages_of_nonsense_are_refused(raw: bytes) -> None:
    for read in (HandoffOffer.unpack, lambda body: OfferProgress.unpack(body, 3), Take.unpack):
        with contextlib.suppress(wire.BadMessage):
            read(raw)
    with contextlib.suppress(ValueError):
        assert pack_notice(unpack_notice(raw)) == raw


@given(st.text(max_size=300))
def test_notes(name: str) -> None:
    with contextlib.suppress(UnicodeEncodeError):
        raw = pack_notice(name)
        assert unpack_notice(raw) == name
        for end in (0, 1, 12, len(raw) - 1):
            with pytest.raises(ValueError):
                unpack_notice(raw[:end])


def test_notes_are_those_of_msgspec() -> None:
    """As LMCache's own class is written by it."""
    head = b"\x82\xa4type\xaaProxyNotif\xa6req_id"
    assert pack_notice("17") == head + b"\xa217"
    assert pack_notice("x" * 40) == head + b"\xd9\x28" + b"x" * 40
    assert pack_notice("é" * 200) == head + b"\xda\x01\x90" + "é".encode() * 200
    for bad in (head + b"\xa217!", b"\x82\xa6req_id\xa217\xa4type\xa1x", b"\x81\xa4type\xa1x", b""):
        with pytest.raises(ValueError, match="note"):
            unpack_notice(bad)


def test_mistakes_in_a_file() -> None:
    for bad in (decoder(handoff={"offers": True}), decoder(handoff={"proxy": "h:1"})):
        with pytest.raises(ConfigProblems, match="needs `serve`"):
            load_config(bad)
    for at in ("nowhere", "a:b:c"):
        with pytest.raises(ConfigProblems):
            load_config(telling(at))
