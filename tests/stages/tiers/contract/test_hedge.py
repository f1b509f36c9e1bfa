"""A race of two attempts: who runs, who is ended, and by whom."""

from __future__ import annotations

import anyio
import pytest

from tierloom.stages.tiers.contract.hedge import race

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    return request.param


class Attempt:
    """Gives `result` when told, and notes what became of it."""

    def __init__(self, *, result: bool, at_once: bool = False) -> None:
        self.result, self.what = result, "never begun"
        self.may = anyio.Event()
        self.begun = anyio.Event()
        if at_once:
            self.may.set()

    async def __call__(self) -> bool:
        self.what = "cancelled"
        self.begun.set()
        await self.may.wait()
        self.what = "ended"
        return self.result


@pytest.mark.parametrize("result", [True, False])
async def test_a_first_that_ends_in_time_is_all_that_runs(result) -> None:
    first, second = Attempt(result=result, at_once=True), Attempt(result=True)
    await race(first, second, 30.0)
    assert (first.what, second.what) == ("ended", "never begun")


@pytest.mark.parametrize(
    ("order", "results", "ends"),
    [
        ("first", (True, True), ("ended", "cancelled")),
        ("second", (True, True), ("cancelled", "ended")),
        ("second first", (True, False), ("ended", "ended")),
        ("first second", (False, True), ("ended", "ended")),
        ("first second", (False, False), ("ended", "ended")),
    ],
)
async def test_the_first_that_succeeds_ends_the_other(order, results, ends) -> None:
    first, second = (Attempt(result=result) for result in results)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(race, first, second, 0.0)
        await second.begun.wait()
        assert first.what == "cancelled", "it must still be running"
        for name in order.split():
            {"first": first, "second": second}[name].may.set()
            await anyio.wait_all_tasks_blocked()
    assert (first.what, second.what) == ends


async def test_whoever_cancels_the_race_cancels_both() -> None:
    first, second = Attempt(result=True), Attempt(result=True)
    with anyio.move_on_after(30) as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(race, first, second, 0.0)
            await second.begun.wait()
            scope.cancel()
    assert scope.cancelled_caught
    assert (first.what, second.what) == ("cancelled", "cancelled")
