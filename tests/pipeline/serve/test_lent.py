"""lend and borrow: what one engine's memory evicts lies in memory that another does not use."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import Engine, config, settle, tokens, with_disk
from peer_process import engine as engine_process
from servers import redis
from trips import until

from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.config.problems import ConfigProblems

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Open
    from peer_process import EngineProcess

PROMPT = 192
"""Tokens: three chunks, which are as much as a borrower's memory takes."""
OBJECT = 28 << 10
"""Bytes of a chunk of the tests' engine."""


def borrower(at: str, **near: Any) -> dict[str, Any]:
    """An engine with room for one prompt."""
    peers = {"use": "peer", "directory": [at], "timeout": "2 s", "borrow": "1 MiB"} | near
    made = config(tiers__hot__capacity=3 * OBJECT, tiers__near=peers)
    made["graphs"]["retrieve"]["stages"]["plan"] = {"use": "lookup", "tiers": ["hot", "near"]}
    return made


def lender(**changes: Any) -> dict[str, Any]:
    return config(serve={"tiers": ["hot"], "lend": "1 MiB"}, **changes)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """A lender in a process of its own; the last test kills it."""
    with engine_process(tmp_path_factory.mktemp("lender"), lender()) as made:
        yield made


class Asker:
    """The borrower, and prompts by number that it stores and looks for."""

    def __init__(self, opened: Open, source: dict[str, Any]) -> None:
        self.engine = Engine()
        self.pipe = opened(source, self.engine)
        self.at = self.engine.slots(PROMPT)
        self.borrowed = self.pipe.tiers["near"].tier.borrowed

    def store(self, *prompts: int) -> None:
        """One after the other, each when those before it have found their place."""
        for prompt in prompts:
            got = self.pipe.store(tokens(PROMPT, prompt), self.engine.caches, self.at).wait(10)
            assert got.tokens == PROMPT
            assert not got.lost
            until(lambda: not self.borrowed._queued)

    def finds(self, prompt: int) -> dict[str, int]:
        """How many of its chunks come, by tier; all that comes is right."""
        target = self.engine.blank()
        got = self.pipe.retrieve(tokens(PROMPT, prompt), target.caches, self.at).wait(10)
        there = slice(0, got.tokens)
        assert torch.equal(
            target.rows(self.at)[:, :, there], self.engine.rows(self.at)[:, :, there]
        )
        return dict(got.tiers)


def lent(by: Any) -> int:
    """Bytes that it keeps for others."""
    figures = by.stats()["serve"] if hasattr(by, "stats") else by.tell(stats="serve")
    return int(figures["lent"])


def test_what_was_evicted_is_found_at_the_lender(opened: Open, other: EngineProcess) -> None:
    asker = Asker(opened, borrower(other.url))
    asker.store(1)
    assert asker.borrowed.nbytes == 0, "nothing was evicted"
    asker.store(2, 3)
    assert [asker.finds(n) for n in (1, 2, 3)] == [{"near": 3}, {"near": 3}, {"hot": 3}]
    assert asker.borrowed.nbytes == 6 * OBJECT == lent(other)
    assert other.tell(retrieve=1, tokens=PROMPT)["tokens"] == 0, "it is no tier of the lender's"
    asker.store(1)
    asker.store(2)
    assert asker.borrowed.nbytes == 9 * OBJECT, "what is there already is not counted again"
    assert asker.pipe.stats()["tiers"]["near"]["puts"] == 9
    other.stores(7)
    asker.store(7)
    before = asker.borrowed.nbytes
    asker.store(8)
    assert asker.borrowed.nbytes == before, "what the lender has of its own is not borrowed"
    # what is reset is gone there, too
    asker.pipe.clear()
    assert (asker.borrowed.nbytes, lent(other)) == (0, 0)
    assert [asker.finds(n) for n in (1, 2, 3)] == [{}, {}, {}]


def test_a_reset_while_something_is_put(opened: Open, other: EngineProcess) -> None:
    asker = Asker(opened, borrower(other.url, timeout="20 s"))
    until(lambda: asker.pipe.tiers["near"].tier.healthy != [] and asker.finds(1) == {})
    with other.paused():
        for prompt in (1, 2):
            asker.pipe.store(tokens(PROMPT, prompt), asker.engine.caches, asker.at).wait(10)
        assert asker.borrowed._queued
        asker.pipe.clear()
    until(lambda: not asker.borrowed._queued)
    assert (asker.borrowed.nbytes, lent(other)) == (0, 0)


def test_a_borrower_keeps_to_its_most(opened: Open, other: EngineProcess) -> None:
    """What was put first goes, at the lender as well."""
    asker = Asker(opened, borrower(other.url, borrow=4 * OBJECT))
    for prompt in range(1, 6):
        asker.store(prompt)
        assert lent(other) == asker.borrowed.nbytes <= 4 * OBJECT
    assert asker.finds(4) == {"near": 3}
    assert asker.finds(1) == {}
    asker.pipe.clear()


def test_a_lender_keeps_to_its_most(opened: Open) -> None:
    other = opened(lender(serve__lend=4 * OBJECT), Engine())
    asker = Asker(opened, borrower(other.serves_at))
    for prompt in range(1, 6):
        asker.store(prompt)
        assert lent(other) <= 4 * OBJECT
    assert (asker.finds(4), asker.finds(1)) == ({"near": 3}, {})


def test_one_that_lends_nothing_gets_nothing(opened: Open) -> None:
    other = opened(lender(serve__lend=0), Engine())
    asker = Asker(opened, borrower(other.serves_at))
    asker.store(1, 2)
    assert (asker.borrowed.nbytes, asker.borrowed.dropped) == (0, 3)
    assert asker.finds(1) == {}
    assert asker.pipe.tiers["near"].tier.healthy, "it is read as before"


def test_nothing_of_a_lenders_own_goes_for_what_others_put(opened: Open) -> None:
    """Its memory fills as ever, and what is put then is refused."""
    engine, room = Engine(), 36 * OBJECT
    other = opened(lender(tiers__hot__capacity=room, budget__arena="1 MiB"), engine)
    asker = Asker(opened, borrower(other.serves_at, borrow="4 MiB"))
    hot = other.tiers["hot"]

    def stores(*seeds: int) -> None:
        for seed in seeds:
            other.store(tokens(512, seed), engine.caches, engine.slots(512)).wait(10)

    stores(*range(101, 105))
    asker.store(*range(1, 12))
    assert lent(other) == room - hot.stat().nbytes == 4 * OBJECT
    assert hot.counts.evicted == 0
    stores(*range(105, 112))
    assert room - 8 * OBJECT < hot.stat().nbytes <= room, "as many as ever"
    evicted = hot.counts.evicted
    asker.store(21, 22)
    assert lent(other) <= room - hot.stat().nbytes
    assert hot.counts.evicted == evicted


def test_nothing_is_sent_of_memory_that_requests_need(opened: Open) -> None:
    other = opened(lender(), Engine())
    asker = Asker(opened, borrower(other.serves_at))
    arena, portal = asker.pipe.arena, asker.pipe._portal
    asker.store(1)
    portal.call(arena.promises.reserve, arena.working // 2 + 1)
    asker.store(2)
    assert (asker.borrowed.dropped, lent(other)) == (3, 0)
    portal.post(arena.promises.unreserve, arena.working // 2 + 1)
    asker.store(3)
    assert (asker.borrowed.dropped, lent(other)) == (3, 3 * OBJECT)


@pytest.mark.parametrize("end", ["pause", "kill"])
def test_a_lender_that_is_gone_costs_what_it_had(
    opened: Open, other: EngineProcess, end: str
) -> None:
    asker = Asker(opened, borrower(other.url, timeout="300 ms"))
    asker.store(1, 2)
    assert asker.finds(1) == {"near": 3}
    getattr(other, end)()
    asker.store(3, 4)
    assert asker.borrowed.dropped == 6
    assert asker.borrowed.nbytes in (0, 3 * OBJECT)
    assert (asker.finds(1), asker.finds(4)) == ({}, {"hot": 3})
    settle(asker.pipe)
    if end == "pause":
        other.resume()
        until(lambda: asker.finds(1) == {"near": 3})


def test_a_lender_is_found_through_a_directory(opened: Open) -> None:
    """One that was never named for anything, and what it keeps for others."""
    with redis() as server:
        at = f"redis://127.0.0.1:{server.port}/0"
        engine = Engine()
        made = lender()
        made["serve"]["directory"] = at
        other = opened(made, engine)
        asker = Asker(opened, borrower(at))
        end, prompt = time.monotonic() + 20, 1
        while not asker.borrowed.nbytes and time.monotonic() < end:
            asker.store(prompt, prompt := prompt + 1)
            time.sleep(0.1)
        assert lent(other) == asker.borrowed.nbytes > 0
        until(lambda: asker.finds(prompt - 1) == {"near": 3})
        other.close()
        until(lambda: asker.finds(prompt - 1) == {})


def test_what_is_lent_is_memory(tmp_path: Path) -> None:
    made = with_disk(tmp_path, serve={"tiers": ["warm"], "lend": "1 MiB"})
    del made["tiers"]["hot"]
    with pytest.raises(ConfigProblems, match="no tier uses memory"):
        load_config(made)
