"""Which folder a disk tier takes: the one it is given, or of the default ones one that is free.

A default must not stop an engine. Where another process has the default folder, one beside it is as
good: NAME-2, NAME-3 and so on. Where there is no default folder to be had, the tier is down.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tierloom.stages.errors import ConfigError, TierDown
from tierloom.stages.tiers.disk.folder_lock import FolderInUse, FolderLock
from tierloom.stages.user_home import expanded

log = logging.getLogger(__name__)

DEFAULT = "~/.cache/tierloom"
"""What presets name when TIERLOOM_DIR does not: this, `DEFAULT-shared`, `DEFAULT/tp0of2`, ..."""
SERIES = 64
"""Folders of one name that processes may have side by side."""


def is_default(path: str) -> bool:
    """No user chose this folder."""
    return path == DEFAULT or path.startswith((f"{DEFAULT}-", f"{DEFAULT}/"))


def lock_folder(path: str, *, segment: int, owner: bytes) -> FolderLock:
    """A folder that is ours until released: `path`, or where that is a default one and another
    process has it, one beside it. Among free ones, that which `owner` had last comes first, so that
    each engine finds its own again whichever starts first.

    Raises ConfigError for a path that the user chose, TierDown for a default one.
    """
    first = expanded(path)
    with defaults_only_down(path):
        if not is_default(path):
            return FolderLock(first, segment=segment)
        for folder in sorted(_series(first), key=lambda f: FolderLock.owner_of(f) != owner.hex()):
            with suppress(FolderInUse):
                made = FolderLock(folder, segment=segment)
                made.own(owner)
                if folder != first:
                    log.info("disk tier uses %s: other engines use the folders before it", folder)
                return made
        raise ConfigError(f"{first} and the {SERIES - 1} beside it are in use by other processes")


@contextmanager
def defaults_only_down(path: str) -> Iterator[None]:
    """ConfigError inside is TierDown where nobody chose `path`."""
    try:
        yield
    except ConfigError as error:
        if not is_default(path):
            raise
        raise TierDown(f"{error}: set TIERLOOM_DIR") from None


def _series(first: Path) -> list[Path]:
    beside = (first.with_name(f"{first.name}-{n}") for n in range(2, SERIES + 1))
    return [first, *beside]
