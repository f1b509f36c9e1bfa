"""Seconds since the epoch that nobody sets: the wall clock of the start, and what has passed since.

So neither a day back nor a year forward makes a tier forget what it has, or keep it for longer.
"""

from __future__ import annotations

import time

_STARTED = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def steady_time() -> float:
    """The time, whatever became of the wall clock meanwhile; goes on while the machine sleeps."""
    return _STARTED + time.clock_gettime(time.CLOCK_BOOTTIME)
