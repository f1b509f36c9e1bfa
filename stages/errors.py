"""The error tree, whole, and the codes of what was lost.

Errors are for callers who can do something: mend a file, pass another tensor. What goes wrong
while a request is under way is data (`Lost`), because the engine simply recomputes it.
"""

from __future__ import annotations

import importlib.util
from enum import IntEnum


class Lost(IntEnum):
    """Why a chunk was not delivered, or not kept."""

    ABSENT = 1
    """Nobody has it."""
    LATE = 2
    """The request's deadline came first."""
    CORRUPT = 3
    """It is damaged: a header or checksum did not match. The object was dropped."""
    TIER_DOWN = 4
    """The tier failed, timed out, or its breaker is open."""
    NO_ROOM = 5
    """The arena or the tier had no room."""
    BAD_LAYOUT = 6
    """Its geometry is not this engine's. It stays."""
    CANCELLED = 7
    """The request was cancelled."""
    FULL = 8
    """A wire was full and its stage says `when_full: drop`."""
    BEHIND = 9
    """A chunk before it was lost, so it is of no use."""
    BROKEN = 10
    """A stage raised what it should not have; the log has the trace once."""
    NO_KEY = 11
    """It is encrypted with a key that this reader does not have. It stays, as below."""
    WRONG_KEY = 12
    """The key that it names does not open it: it is another's of that name, or was altered."""
    NO_CODEC = 13
    """It is encoded in a way that this version does not know, or cannot undo."""
    NO_CALIBRATION = 14
    """It is encoded by a calibration that is not at hand."""
    NEWER = 15
    """It is written in a format that this version does not know."""
    FOREIGN = 16
    """What has its name is another namespace's, or no object."""

    REFUSED = 17
    """Its tier may not be written: read-only, no permission, or a quota that is used up."""

    @property
    def unreadable(self) -> bool:
        """It is there, for others: it was left where it is."""
        return self in _CURES

    @property
    def cure(self) -> str:
        """What can be done about an unreadable object."""
        return _CURES[self]


_CURES = {
    Lost.BAD_LAYOUT: "give engines of another layout a `model` name of its own",
    Lost.NO_KEY: "name its key file in `keys` of the stage `decode`",
    Lost.WRONG_KEY: "let all who share the tier use the same key files",
    Lost.NO_CODEC: "let all who share the tier run the newest version of those that write",
    Lost.NO_CALIBRATION: "copy the calibration here, or name it in `calibrations` of `decode`",
    Lost.NEWER: "let all who share the tier run the newest version of those that write",
    Lost.FOREIGN: "look who else writes there, and give this tier a place of its own",
}


class TierloomError(Exception):
    """Everything that tierloom raises on purpose."""


class ConfigError(TierloomError):
    """A YAML file or an option that cannot be run. Carries every problem found, not the first."""


class MissingPackage(ConfigError):
    """An optional package cannot be imported; the text says how to install it."""

    def __init__(self, what: str, extra: str, more: str = "") -> None:
        """`what`: the package, and what needs it. `extra`: of tierloom, which brings it."""
        super().__init__(f"{what} is not installed: pip install 'tierloom[{extra}]'{more}")


def require(extra: str, *modules: str) -> None:
    """Raise MissingPackage unless all of these can be imported. Imports none of them."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingPackage(module, extra)


class InputError(TierloomError, ValueError):
    """Tokens, slots or tensors that do not fit. Raised before any memory is touched."""


class LayoutError(InputError):
    """A cache layout that is unknown, ambiguous, or that failed its self-test."""


class ArenaFull(TierloomError):
    """No room for a lease, even after evicting what may be evicted."""


class TierDown(TierloomError):
    """A tier did not answer, or answered with a failure of its own. Opens its breaker."""


class Refused(TierloomError):
    """A tier that works takes no put now: it is full, read-only, or lets us not write."""

    def __init__(self, text: str, lost: Lost = Lost.REFUSED) -> None:
        """`lost`: REFUSED, or NO_ROOM."""
        super().__init__(text)
        self.lost = lost


class BadObject(TierloomError):
    """Bytes that are of no use to this reader. No reason to drop them: others may read them."""

    lost = Lost.NO_CODEC
    """The cause, for whoever asked for the object."""


class Damaged(BadObject):
    """Proof that an object is of no use to anybody, the only reason for which a reader drops one: a
    checksum that fails over bytes that came whole, or a header or a length that contradicts itself
    in a version that we know. What drops objects for being bad takes one of these."""

    lost = Lost.CORRUPT


class Unreadable(BadObject):
    """An object that may well be whole, but is not for this reader: a miss, and it stays."""

    def __init__(self, cause: Lost, text: str) -> None:
        """`cause`: one of those that are `unreadable`."""
        super().__init__(text)
        self.lost = cause


class Closed(TierloomError):
    """The pipeline was used after `close()`."""
