"""Connections to one server, made when they are needed, each for one call at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Generic, Protocol, TypeVar

import anyio


class Poolable(Protocol):
    """A connection that calls use in turn."""

    @property
    def usable(self) -> bool:
        """It is open, and nothing is due or has come that nobody asked for."""

    def close(self) -> None:
        """From now on no byte of it reaches memory. Idempotent."""


C = TypeVar("C", bound=Poolable)


class ConnectionPool(Generic[C]):
    """At most `limit` connections are in use at once. On one loop."""

    def __init__(self, connect: Callable[[], Awaitable[C]], limit: int) -> None:
        self._connect = connect
        self._slots = anyio.Semaphore(limit, fast_acquire=True)
        self._idle: list[C] = []
        self._closed = False

    @property
    def free(self) -> int:
        """Calls that would get a connection at once."""
        return self._slots.value

    @property
    def wanted(self) -> bool:
        """Somebody waits for a connection."""
        return self._slots.statistics().tasks_waiting > 0

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[C]:
        """A connection to oneself, closed where its use ends with an exception. Where it is of no
        use by then, the idle ones are closed too: what happened to it probably happened to them."""
        async with self._slots:
            connection = self._take() or await self._connect()
            try:
                yield connection
            except BaseException:
                usable = connection.usable
                connection.close()
                if not usable:
                    self.forget()
                raise
            if self._closed:
                connection.close()
            else:
                self._idle.append(connection)

    def forget(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()

    def drop_dead(self) -> int:
        """Close idle connections whose other side has gone; how many are left."""
        idle, self._idle = self._idle, []
        for connection in idle:
            if connection.usable:
                self._idle.append(connection)
            else:
                connection.close()
        return len(self._idle)

    def close(self) -> None:
        """Close the idle connections now, those in use when they are given back."""
        self._closed = True
        self.forget()

    def _take(self) -> C | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
            connection.close()
        return None
