"""The user's own folders, also for users that have none: arbitrary ids, read-only roots."""

from __future__ import annotations

import os
from pathlib import Path

from tierloom.stages.errors import ConfigError


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with `~` put in. A user without a home folder has `/`, as containers give to ids
    that nobody knows: there is nothing in it, and it is not his to write. Raises ConfigError."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no HOME, and no entry for this user; or none for that of `~user`
        first, *rest = Path(path).parts
        if first != "~":
            raise ConfigError(f"{path}: there is no user {first[1:]!r}") from None
        return Path("/", *rest)


def cache_folder() -> Path:
    """Where lies what can be made again: `${XDG_CACHE_HOME:-~/.cache}/tierloom`."""
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tierloom"
