"""Each order once: whoever sends it, however often, and whatever becomes of who asked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tierloom.adapters.door.order_book import KEEP, OrderBook
from tierloom.stages.errors import Closed, InputError, TierDown
from tierloom.testing import Clock

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Work:
    def __init__(self, *, error: Exception | None = None, part: Any = None) -> None:
        self.count, self.go, self._error = 0, asyncio.Event(), error
        self._part = part or {"n": 1}

    async def __call__(self) -> dict[str, Any]:
        self.count += 1
        await self.go.wait()
        if self._error is not None:
            raise self._error
        return {"0": self._part}


async def test_at_once_later_and_after_who_asked_has_left() -> None:
    book, work = OrderBook(clock := Clock()), Work()
    asked = [asyncio.create_task(book.once("k", "clear", {"a": 1}, 9, work)) for _ in range(3)]
    await asyncio.sleep(0.01)
    asked[0].cancel()
    found = book.find("k")
    assert (found.state, found.parts) == ("running", {})
    with pytest.raises(InputError, match="another order's, clear"):
        await book.once("k", "clear", {"a": 2}, 9, work)
    work.go.set()
    ended = [await task for task in asked[1:]]
    ended.append(await book.once("k", "clear", {"a": 1}, 9, work))
    assert {id(each) for each in ended} == {id(found)}
    assert (found.state, found.parts, work.count) == ("done", {"0": {"n": 1}}, 1)
    clock.now += KEEP + 1
    assert book.find("k") is None
    await book.once("k", "clear", {"a": 1}, 9, work)
    assert work.count == 2


async def test_late_failed_and_wrong() -> None:
    book = OrderBook()
    late = await book.once("late", "pin", {}, 0.01, Work())
    assert (late.state, late.detail) == ("late", "its deadline came first")
    failed = Work(part={"error": "x"})
    failed.go.set()
    assert (await book.once("failed", "pin", {}, 9, failed)).state == "failed"
    wrong = Work(error=InputError("no such tier"))
    wrong.go.set()
    for _ in range(2):
        with pytest.raises(InputError, match="no such tier"):
            await book.once("wrong", "pin", {}, 9, wrong)
    assert (wrong.count, book.find("wrong").detail) == (1, "no such tier")


async def test_what_is_closed_meanwhile() -> None:
    book, work = OrderBook(), Work()
    asked = asyncio.create_task(book.once("k", "clear", {}, 9, work))
    await asyncio.sleep(0.01)
    book.find("k").task.cancel()
    with pytest.raises(Closed, match="closed meanwhile"):
        await asked
    assert book.find("k").state == "failed"


async def test_as_many_as_are_remembered() -> None:
    book, work = OrderBook(), Work()
    asked = [asyncio.create_task(book.once(str(i), "pin", {}, 9, work)) for i in range(1024)]
    await asyncio.sleep(0.01)
    with pytest.raises(TierDown, match="under way"):
        await book.once("more", "pin", {}, 9, work)
    work.go.set()
    await asyncio.gather(*asked)
    await book.once("more", "pin", {}, 9, work)
    assert book.find("0") is None
    assert book.find("1") is not None
