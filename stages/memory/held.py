"""Whoever touches a lease's memory from elsewhere than the task that owns it holds a reference.

Elsewhere is a thread (`Call`, through which every call of a pool goes), the loop while bytes are
received or sent (`held`), and a foreign library that cannot be made to stop (`Transfers`). So a
lease that was released is touched by nobody, whichever call was cancelled meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio

from tierloom.stages.memory.arena import Lease

_SWEEP = 0.02  # seconds between two looks at transfers whose callers have gone


class Call:
    """A call that a thread is to run, and the leases that it touches, retained from now on.

    They are released once: by the thread when it is through, or by whoever drops the call before a
    thread has taken it.
    """

    __slots__ = ("_args", "_fn", "_leases", "_open")

    def __init__(
        self, fn: Callable[..., Any], args: tuple[Any, ...], leases: Iterable[Lease]
    ) -> None:
        """Raises RuntimeError when a lease has gone home already."""
        self._fn, self._args = fn, args
        self._leases = _retained(leases)
        self._open = [True]  # popped by one only, as lists are atomic

    def take(self) -> bool:
        """Whether the call is now the asker's, to run or to leave; False: it is another's."""
        if not self._open:
            return False
        try:
            return self._open.pop()
        except IndexError:  # the other was quicker
            return False

    def run(self) -> Any:
        """What `fn` returned or raised; for the thread that took it."""
        try:
            return self._fn(*self._args)
        finally:
            self._end()

    def drop(self) -> None:
        """Nobody waits for it any more: it is never run, unless a thread has taken it."""
        if self.take():
            self._end()

    def _end(self) -> None:
        leases, self._leases = self._leases, ()
        self._fn, self._args = _nothing, ()
        for lease in leases:
            lease.release()


@contextmanager
def held(*leases: Lease) -> Iterator[None]:
    """Hold leases while a task awaits bytes into them, or out of them."""
    mine = _retained(leases)
    try:
        yield
    finally:
        for lease in mine:
            lease.release()


class Transfers:
    """Leases that a foreign library may still be at although its caller has gone. For asyncio.

    A transfer that nobody can end keeps its lease until it is through, which is looked for from the
    loop: a finalizer would run wherever the collector does, under whatever lock.
    """

    def __init__(self) -> None:
        self._left: list[tuple[Lease, Callable[[], bool]]] = []
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._left)

    def keep(self, lease: Lease, through: Callable[[], bool]) -> None:
        """Hold a lease until `through` says that its transfer is; it is asked at once."""
        if not through():
            self._left.append((lease.retain(), through))
            self._arm()

    async def idle(self, seconds: float) -> bool:
        """Wait until all are through; whether that came true in time."""
        with anyio.move_on_after(seconds):
            while self._sweep():  # noqa: ASYNC110 (nothing tells when a transfer is through)
                await anyio.sleep(_SWEEP)
        return not self._left

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_SWEEP, self._on)

    def _on(self) -> None:
        self._timer = None
        if self._sweep():
            self._arm()

    def _sweep(self) -> bool:
        left, self._left = self._left, []
        for lease, through in left:
            if through():
                lease.release()
            else:
                self._left.append((lease, through))
        return bool(self._left)


def _retained(leases: Iterable[Lease]) -> tuple[Lease, ...]:
    """All of them, or none."""
    mine: list[Lease] = []
    try:
        for lease in leases:
            mine.append(lease.retain())  # noqa: PERF401 (those before one that raises are released)
    except BaseException:
        for lease in mine:
            lease.release()
        raise
    return tuple(mine)


def _nothing() -> None:
    """In the place of a call that is over, so that its arguments are freed."""
