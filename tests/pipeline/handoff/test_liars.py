"""What a prefiller sends is believed when it is proved."""

from __future__ import annotations

import itertools
import logging
import time
from typing import TYPE_CHECKING

import pytest
from conftest import Engine, settle, tokens
from handing import IDS, Liar, begin_land, decoder, keys_of, prefiller
from trips import get

from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.taking import PieceHead, Take

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from conftest import Open


@pytest.fixture(autouse=True)
def _nothing_broke(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What breaks is logged, and would cost but a miss."""
    yield
    assert not [r.getMessage() for r in caplog.get_records("call") if r.levelno >= logging.ERROR]


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
