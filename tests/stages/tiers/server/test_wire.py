"""The messages of a server: what is packed comes out again, and nothing else is believed."""

from __future__ import annotations

import contextlib
import random
import tracemalloc
from functools import partial

import anyio
import pytest

from tierloom.stages.errors import Lost
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.connection import Connection
from tierloom.stages.tiers.server.protocol import BadMessage, Kind
from tierloom.testing import ALL, SIZE, key_of, mutations

HELLO = wire.Hello(1, 0, b"s" * 32, b"n" * 32, b"p" * 32)
WELCOME = wire.Welcome(1, b"p" * 32, 1 << 26, 1 << 28, 1 << 34)
GREETING = wire.Greeting(1, 1, True, b"e" * 16, b"n" * 32)
WANTED = [wire.Wanted(key_of(i), i, ALL, SIZE) for i in range(3)]
OFFERS = [wire.Offer(key_of(i), SIZE * i) for i in range(3)]
ITEM = wire.Item(0, 3, SIZE, 0, SIZE)
LOANS = [
    wire.Loan(0, 1, 4096, SIZE),
    wire.Loan(wire.BYTES, 0, 0, 0),
    wire.Loan(Lost.ABSENT, 0, 0, 0),
]
HOLDINGS = wire.Holdings(1, 2, 3, 4, 5)
ASKED = wire.Wanted(key_of(0), 0, 3, 0)
KEYS = [key_of(i) for i in range(3)]

CASES = {
    "greeting": (wire.pack(GREETING), partial(wire.unpack, wire.Greeting), GREETING),
    "hello": (wire.pack(HELLO), partial(wire.unpack, wire.Hello), HELLO),
    "welcome": (wire.pack(WELCOME), partial(wire.unpack, wire.Welcome), WELCOME),
    "keys": (b"".join(KEYS), wire.keys_of, KEYS),
    "wanted": (wire.pack(*WANTED), lambda b: wire.unpack_all(wire.Wanted, b, 8), WANTED),
    "offers": (wire.pack(*OFFERS), lambda b: wire.unpack_all(wire.Offer, b, 8), OFFERS),
    "item": (wire.pack(ITEM), lambda b: wire.item_of(b, ASKED, 1 << 30), ITEM),
    "codes": (bytes([0, 1, 255]), lambda b: wire.codes_of(b, 3, wire.SEND), [0, 1, 255]),
    "loans": (wire.pack(*LOANS), lambda b: wire.loans_of(b, 3, 1 << 20), LOANS),
    "ids": (wire.pack_ids([1, 1 << 60]), wire.ids_of, [1, 1 << 60]),
    "holdings": (wire.pack(HOLDINGS), partial(wire.unpack, wire.Holdings), HOLDINGS),
    "kept": (
        bytes([0, 5]) + wire.pack(HOLDINGS), lambda b: wire.kept_of(b, 2),
        ([0, 5], HOLDINGS),
    ),
    "error": (wire.pack_error(wire.ErrorCode.TOKEN, "no"), wire.error_of, (3, "no")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_there_and_back(case) -> None:
    raw, parse, value = case
    assert parse(raw) == value


@pytest.mark.parametrize("name", [name for name in CASES if name != "error"])
def test_other_lengths_are_refused(name: str) -> None:
    raw, parse, _ = CASES[name]
    for other in (raw[:-1], raw + b"\0"):
        with pytest.raises(BadMessage):
            parse(other)


def test_a_message_fits_what_is_allowed() -> None:
    for most, size in ((wire.KEYS, 32), (wire.OBJECTS, 48), (wire.OBJECTS, 40)):
        assert most * size <= wire.BODY
    assert max(len(wire.pack(HELLO)), len(wire.pack(WELCOME))) <= wire.FIRST


@pytest.mark.parametrize(
    "item",
    [
        ITEM._replace(nbytes=SIZE + 1), ITEM._replace(nbytes=1 << 40), ITEM._replace(end=100),
        ITEM._replace(begin=4096), ITEM._replace(end=SIZE + 4096), ITEM._replace(loaded=4),
        ITEM._replace(code=200), ITEM._replace(begin=8192, end=4096),
        ITEM._replace(nbytes=0, end=0),
    ],
)  # fmt: skip
def test_lengths_of_an_object_that_cannot_be(item: wire.Item) -> None:
    with pytest.raises(BadMessage):
        wire.item_of(wire.pack(item), ASKED, 1 << 30)


@pytest.mark.parametrize(
    "loan",
    [
        wire.Loan(0, 1, 0, 0), wire.Loan(0, 1, 1, 4096), wire.Loan(0, 1, 0, 4097),
        wire.Loan(0, 1, (1 << 20) - 4096, 8192), wire.Loan(0, 1, 1 << 63, 4096),
        wire.Loan(0, 1, 0, (1 << 20) + 4096), wire.Loan(99, 0, 0, 0),
    ],
)  # fmt: skip
def test_loans_lie_inside_the_memory(loan: wire.Loan) -> None:
    with pytest.raises(BadMessage):
        wire.loans_of(wire.pack(loan), 1, 1 << 20)


def test_what_an_error_says_is_made_printable() -> None:
    _, text = wire.error_of(b"\3\0bad\x1b[31m\n\xff")
    assert text.isprintable()


@pytest.mark.slow
def test_100_000_mutated_messages_in_memory() -> None:
    """A named error, or a value of the right kind; never more memory than the message allows."""
    messages = [
        (wire.message(kind, 1, raw), parse)
        for kind, (raw, parse, _) in zip(Kind, CASES.values(), strict=False)
    ]
    refused = read = 0
    for seed, (raw, parse) in enumerate(messages):
        for changed in mutations(raw, 100_000 // len(messages) + 1, seed):
            try:
                _, _, length = wire.head(changed[:16].ljust(16, b"\0"))
                parse(changed[16 : 16 + length])
                read += 1
            except BadMessage:  # noqa: PERF203
                refused += 1
    assert refused > 10_000
    assert read > 10_000
    assert refused + read >= 100_000


def test_mutated_messages_take_no_memory() -> None:
    rng = random.Random(0)
    tracemalloc.start()
    for raw, parse, _ in CASES.values():
        for changed in mutations(wire.message(Kind.HAS, 1, raw), 300, rng.randrange(1000)):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with contextlib.suppress(BadMessage):
                wire.head(changed[:16].ljust(16, b"\0"))
                parse(changed[16:])
            assert tracemalloc.get_traced_memory()[1] - before < 64 << 10
    tracemalloc.stop()


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_line_is_a_stream(anyio_backend: str) -> None:
    """However the bytes are cut, the same messages come out, and bulk lands where it should."""
    import socket

    rng = random.Random(2)
    a, b = socket.socketpair()
    one, two = Connection(a), Connection(b)
    bulk = rng.randbytes(3 << 20)
    raw = b"".join(wire.message(Kind.HAS, n, b"k" * (32 * n)) for n in range(200)) + bulk
    last = wire.message(Kind.HAS, 9, b"k" * (32 * 4096))

    async def write() -> None:
        at = 0
        while at < len(raw):
            size = rng.choice((1, 7, 100, 5000, 100_000))
            await one.send(raw[at : at + size])
            at += size
        await one.send(last, wire.message(Kind.PING, 5))

    async with anyio.create_task_group() as group:
        group.start_soon(write)
        for n in range(200):
            assert await two.message() == (Kind.HAS, n, b"k" * (32 * n))
        into = bytearray(len(bulk))
        await two.fill(memoryview(into)[: 1 << 20])
        await two.skip(1 << 20)
        await two.fill(memoryview(into)[2 << 20 :])
        assert into[: 1 << 20] == bulk[: 1 << 20]
        assert into[2 << 20 :] == bulk[2 << 20 :]
        assert len((await two.message()).body) == 32 * 4096
        assert (await two.message()).kind is Kind.PING
    assert two.usable
    one.close()
    assert not two.usable
    two.close()
