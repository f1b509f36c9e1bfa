"""RESP out of bytes that nobody trusts: answers, or a named error, in bounded memory."""

from __future__ import annotations

import asyncio
import contextlib
import random
import tracemalloc

import pytest

from tierloom.stages.errors import BadObject, TierDown
from tierloom.stages.tiers.redis.resp import ErrorReply, PendingReply, ReplyParser, command
from tierloom.testing import PoisonArena, mutations

BODY = 3000
RIGHT = (
    b":1\r\n*2\r\n$2\r\n17\r\n*2\r\n$3\r\nabc\r\n$-1\r\n+OK\r\n-OOM command not allowed\r\n"
    + b"$%d\r\n" % BODY + bytes(range(250)) * 12 + b"\r\n" + b"$-1\r\n" + b"$5\r\nworld\r\n"
)  # fmt: skip
SMALL = [1, [b"17", [b"abc", None]], b"OK", ErrorReply("OOM")]


class Feed:
    """An `ReplyParser` that was asked for all of RIGHT, and is fed in parts."""

    def __init__(self, loop, limit=4096):
        self.answers = ReplyParser()
        self.into = [bytearray(BODY) for _ in range(2)]
        self.wants = [
            PendingReply(loop.create_future(), count=4, limit=limit),
            *(PendingReply(loop.create_future(), into=memoryview(each)) for each in self.into),
            PendingReply(loop.create_future(), limit=limit),
        ]
        for want in self.wants:
            self.answers.expect(want)

    def give(self, data, cuts):
        """Feed `data`, cut at will. Raises what the reader does, after telling it so."""
        at = 0
        try:
            while at < len(data):
                room = self.answers.get_buffer()
                assert len(room)
                n = min(len(room), len(data) - at, next(cuts))
                room[:n] = data[at : at + n]
                self.answers.took(n)
                at += n
        except (TierDown, BadObject) as error:
            self.answers.fail(error)
            raise

    @property
    def got(self):
        return [want.future.result() for want in self.wants]


@pytest.fixture
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def always(n):
    while True:
        yield n


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 1 << 20])
def test_answers_however_they_are_cut(loop, size) -> None:
    feed = Feed(loop)
    feed.give(RIGHT, always(size))
    assert feed.got == [SMALL, [BODY], [None], [b"world"]]
    assert feed.into == [bytearray(range(250)) * 12, bytearray(BODY)]
    assert not feed.answers.due


def test_a_shorter_body_is_told_by_its_length(loop) -> None:
    answers, into = ReplyParser(), bytearray(b"x" * 10)
    want = PendingReply(loop.create_future(), into=memoryview(into))
    answers.expect(want)
    room = answers.get_buffer()
    room[:9] = b"$3\r\nabc\r\n"
    answers.took(9)
    assert want.future.result() == [3]
    assert into == b"abcxxxxxxx"


LIES = {
    "no kind": b"?1\r\n",
    "a push": b">1\r\n:1\r\n",
    "no number": b":one\r\n",
    "two numbers": b":1 2\r\n",
    "no digits": b"$\r\n",
    "a negative length": b"$-2\r\n",
    "a negative count": b"*-7\r\n",
    "a huge string": b"$999999999999\r\n",
    "a number of 40 digits": b"$" + b"9" * 40 + b"\r\n",
    "a huge array": b"*999999999\r\n",
    "an array of more parts than bytes": b"*3000\r\n",
    "arrays in arrays": b"*1\r\n" * 50 + b":1\r\n",
    "a line without end": b"+" + b"a" * 5000,
    "a string longer than it says": b"$2\r\nabcdef\r\n",
    "a long answer in small parts": b"*1000\r\n" + b"$100\r\n" + b"a" * 100_000,
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_lies_are_named(loop, lie) -> None:
    feed = Feed(loop)
    with pytest.raises(TierDown) as caught:
        feed.give(lie, always(1000))
    assert str(caught.value)
    assert all(isinstance(w.future.exception(), TierDown) for w in feed.wants)
    assert not feed.answers.due


@pytest.mark.parametrize(
    "lie",
    [b"$3001\r\n", b"$9999999999\r\n", b":1\r\n", b"*1\r\n$1\r\na\r\n", b"+OK\r\n", b"$-5\r\n"],
)
def test_lies_about_a_payload(loop, lie) -> None:
    """One that is too long is the object's fault, and told from those of the others."""
    answers, into = ReplyParser(), bytearray(BODY)
    wants = [PendingReply(loop.create_future(), into=memoryview(into)) for _ in range(2)]
    for want in wants:
        answers.expect(want)
    kind = BadObject if lie[:1] == b"$" else TierDown
    room = answers.get_buffer()
    room[: len(lie)] = lie
    with pytest.raises(kind) as caught:
        answers.took(len(lie))
    answers.fail(caught.value)
    assert [type(w.future.exception()) for w in wants] == [kind, TierDown]
    assert into == bytes(BODY)


def test_what_nobody_asked_for(loop) -> None:
    feed = Feed(loop)
    with pytest.raises(TierDown, match="not requested"):
        feed.give(RIGHT + b"+OK\r\n", always(1 << 20))


def test_after_a_failure_no_memory_is_touched(loop) -> None:
    feed = Feed(loop)
    feed.give(RIGHT[: RIGHT.index(b"$3000") + 500], always(1 << 20))
    feed.answers.fail(TierDown("given up"))
    before = bytes(feed.into[0])
    assert feed.answers.get_buffer().obj is not feed.into[0]
    assert bytes(feed.into[0]) == before


@pytest.mark.slow
def test_fuzz(loop) -> None:
    """100,000 mutated answers: each ends in answers, in waiting, or in an error with a name."""
    rng = random.Random(1)
    ends = {"answers": 0, "waiting": 0, "refused": 0}
    short = RIGHT.replace(b"$3000", b"$30").replace(bytes(range(250)) * 12, bytes(range(30)))

    def cuts():
        while True:
            yield rng.choice((1, 5, 40, 1000))

    for data in mutations(short, 100_000):
        feed = Feed(loop)
        try:
            feed.give(data, cuts())
        except (TierDown, BadObject):
            ends["refused"] += 1
            assert all(want.future.done() for want in feed.wants)
        else:
            ends["waiting" if feed.answers.due else "answers"] += 1
        assert len(feed.answers._buffer) <= 16 << 10
    assert min(ends.values()) > 1000, ends


def test_lies_take_no_memory(loop) -> None:
    for lie in LIES.values():
        feed, data = Feed(loop, limit=1 << 20), lie * 100
        tracemalloc.start()
        with contextlib.suppress(TierDown, BadObject):
            feed.give(data, always(1000))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20, lie[:40]


def test_commands() -> None:
    assert command("GET", b"k\xff", 7) == b"*3\r\n$3\r\nGET\r\n$2\r\nk\xff\r\n$1\r\n7\r\n"


def test_a_refusal_quotes_nothing(loop) -> None:
    """Old servers answer AUTH with what they were sent."""
    answers = ReplyParser()
    wants = [PendingReply(loop.create_future()) for _ in range(2)]
    for want in wants:
        answers.expect(want)
    said = b"-ERR unknown command `AUTH`, with args: `s3cret`\r\n-secret\r\n"
    answers.get_buffer()[: len(said)] = said
    answers.took(len(said))
    assert [w.future.result() for w in wants] == [[ErrorReply("ERR")], [ErrorReply("ERR")]]


@pytest.mark.parametrize("end", ["answered", "failed", "left"])
def test_what_is_received_into_is_held(end):
    """Until it has come, or the connection is given up, whatever became of who asked for it."""
    arena, loop = PoisonArena(8192, huge_pages=False), asyncio.new_event_loop()
    lease, answers = arena.lease(BODY), ReplyParser()
    want = PendingReply(loop.create_future(), into=lease.view[:BODY], lease=lease)
    answers.expect(want)
    lease.release()
    head = b"$%d\r\n" % BODY
    answers.get_buffer()[: len(head)] = head
    answers.took(len(head))
    answers.get_buffer()[:10] = b"0123456789"
    answers.took(10)
    assert arena.leases == 1
    if end == "answered":
        answers.get_buffer()[: BODY - 10] = bytes(BODY - 10)
        answers.took(BODY - 10)
        assert arena.leases == 1, "its end has not come"
        answers.get_buffer()[:2] = b"\r\n"
        answers.took(2)
        assert want.future.result() == [BODY]
    else:
        if end == "left":
            want.future.cancel()
            assert arena.leases == 1
        answers.fail(TierDown("given up"))
    assert arena.leases == 0
    answers.get_buffer()[:4] = b"late"
    loop.close()
    arena.close()
