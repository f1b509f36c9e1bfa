"""The error tree, whole, and the codes of what was lost.

Errors are for callers who can do something: mend a file, pass another tensor. What goes wrong
while a request is under way is data (`Lost`), because the engine simply recomputes it.
"""

from __future__ import annotations

from enum import IntEnum


class TierloomError(Exception):
    """Everything that tierloom raises on purpose."""


class ConfigError(TierloomError):
    """A YAML file or an option that cannot be run. Carries every problem found, not the first."""


class InputError(TierloomError, ValueError):
    """Tokens, slots or tensors that do not fit. Raised before any memory is touched."""


class LayoutError(InputError):
    """A cache layout that is unknown, ambiguous, or that failed its self-test."""


class ArenaFull(TierloomError):
    """No room for a lease, even after evicting what may be evicted."""


class TierDown(TierloomError):
    """A tier did not answer, or answered with a failure of its own. Opens its breaker."""


class BadObject(TierloomError):
    """Bytes that are not the object they should be: wrong magic, key, length or checksum."""


class Closed(TierloomError):
    """The pipeline was used after `close()`."""


class Lost(IntEnum):
    """Why a chunk was not delivered, or not kept."""

    ABSENT = 1
    """Nobody has it."""
    LATE = 2
    """The request's deadline came first."""
    CORRUPT = 3
    """A header or checksum did not match; the object was dropped."""
    TIER_DOWN = 4
    """The tier failed, timed out, or its breaker is open."""
    NO_ROOM = 5
    """The arena or the tier had no room."""
    BAD_LAYOUT = 6
    """Its geometry is not this engine's."""
    CANCELLED = 7
    """The request was cancelled."""
    FULL = 8
    """A wire was full and its stage says `when_full: drop`."""
    BEHIND = 9
    """A chunk before it was lost, so it is of no use."""
    BROKEN = 10
    """A stage raised what it should not have; the log has the trace once."""
