"""A thread that owns an agent: it looks after transfers while there are any, and sleeps else.

NIXL's own thread spins, which costs a busy machine more than the copies themselves.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

_NAP, _LONG_NAP, _PART = 0.0002, 0.001, 8
"""Seconds between two looks at what is under way: at least, at most, and as a part of the time in
which nothing has happened."""


class PolledThread:
    """Runs what is posted to it, in order, and `_look` while `_busy`. Begins with the first."""

    def __init__(self, name: str) -> None:
        self._wake = threading.Condition()
        self._posted: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._name, self._thread = name, threading.Thread(target=self._run, name=name, daemon=True)
        self._closed = False

    def post(self, fn: Callable[..., None], *args: Any) -> bool:
        """Have `fn(*args)` called on the thread; any thread. False: it has ended."""
        with self._wake:
            if self._closed:
                return False
            self._posted.append((fn, args))
            if self._thread.ident is None:
                self._thread.start()
            self._wake.notify()
        return True

    def close(self, timeout: float = 5.0) -> None:
        """End what is under way, and wait for the thread. Idempotent."""
        begun = self._thread.ident is not None
        with self._wake:
            if begun and not self._closed:
                self._posted.append((self._end, ()))
                self._wake.notify()
            self._closed = True
        if begun:
            self._thread.join(timeout)

    @property
    def _busy(self) -> bool:
        raise NotImplementedError

    def _look(self) -> bool:
        """Whether something happened, so that the next look is due at once."""
        raise NotImplementedError

    def _end(self) -> None:
        """Release everything; the last call of the thread."""
        raise NotImplementedError

    def _run(self) -> None:
        moved, since = False, 0.0
        while True:
            if moved:
                since = time.monotonic()
            elif self._busy and not self._posted:
                nothing = (time.monotonic() - since) / _PART
                time.sleep(min(max(_NAP, nothing), _LONG_NAP))  # a condition costs half more
            with self._wake:
                if not self._posted and not self._busy:
                    self._wake.wait()
                    since = time.monotonic()
                calls, self._posted = self._posted, deque()
            try:
                self._run_all(calls)
                if self._closed and not self._posted:
                    return
                moved = self._busy and self._look()
            except Exception:
                log.exception("%s has ended", self._name)
                with self._wake:
                    self._closed = True
                    calls, self._posted = self._posted, deque()
                self._run_all(calls)
                self._end()
                return

    def _run_all(self, calls: deque[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        for fn, args in calls:
            try:
                fn(*args)
            except Exception:  # noqa: PERF203
                log.exception("%s: %s failed", self._name, getattr(fn, "__qualname__", fn))
