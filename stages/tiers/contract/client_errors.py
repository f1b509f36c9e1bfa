"""What a client raised: a failure of its tier, or the end of whoever called it.

Foreign libraries raise what they like: panics of Rust code are no `Exception`, and some raise
CancelledError where nobody was cancelled. None of it may end a task that serves all requests.
"""

from __future__ import annotations

import asyncio
import threading

import anyio


def is_failure(error: BaseException) -> bool:
    """The call failed. False: its caller is being cancelled, or the process ends, and `error` must
    be raised on. Called where it was caught, in the task that made the call."""
    if isinstance(error, Exception):
        return True
    if isinstance(error, anyio.get_cancelled_exc_class()):
        return not _cancelled()
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return threading.current_thread() is not threading.main_thread()
    return not isinstance(error, GeneratorExit)


def _cancelled() -> bool:
    """The current task is being cancelled, by a scope or by itself."""
    if anyio.current_effective_deadline() == float("-inf"):
        return True
    try:
        task = asyncio.current_task()
    except RuntimeError:  # trio, where only scopes cancel
        return False
    cancelling = getattr(task, "cancelling", None)
    return cancelling is None or cancelling() > 0  # Python 3.10 does not say
