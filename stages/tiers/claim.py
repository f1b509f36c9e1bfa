"""One process per folder: a lock that dies with its holder, and a marker that names the format."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

_LOCK, _MARKER = "lock", "tierloom.json"
_FORMAT = {"format": "tierloom disk tier", "version": 1}


class Taken(ConfigError):
    """Another process has the folder."""


class Claim:
    """A folder that is ours until `release`."""

    def __init__(self, folder: Path, *, segment: int) -> None:
        """Make, lock and check the folder. Raises ConfigError, with a cure; Taken.

        `segment` is written down the first time; afterwards the folder's own is in force.
        """
        self._fd, self.folder = -1, folder
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fd = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.segment = self._check(folder / _MARKER, segment)
        except BlockingIOError:
            self.release()
            raise Taken(
                f"{folder}: in use by another disk tier; each process wants a folder of its own: "
                "set TIERLOOM_DIR, or the tier's `path`, to another for one of them"
            ) from None
        except OSError as error:
            self.release()
            raise ConfigError(f"{folder}: {error.strerror}; choose one we may write") from error
        except ConfigError:
            self.release()
            raise

    def release(self) -> None:
        """Let go of the lock; twice does no harm."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def own(self, owner: bytes) -> None:
        """Note whose folder this is, for `owner_of`."""
        with suppress(OSError):  # a full disk: the next start may choose another folder
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, owner.hex().encode(), 0)

    @staticmethod
    def owner_of(folder: Path) -> str:
        """Who had the folder last, in hex; empty: nobody that we know of."""
        try:
            return (folder / _LOCK).read_text()
        except (OSError, ValueError):
            return ""

    @staticmethod
    def segment_of(folder: Path) -> int:
        """Bytes of a segment, as the marker of a disk tier's folder says. Raises ConfigError."""
        try:
            return int(json.loads((folder / _MARKER).read_text())["segment"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{folder}: not the folder of a disk tier: {error}") from error

    @staticmethod
    def _check(marker: Path, segment: int) -> int:
        """The folder's segment size; writes the marker of a new folder."""
        if not marker.exists():
            fresh = marker.with_suffix(".tmp")
            fresh.write_text(json.dumps(_FORMAT | {"segment": segment}) + "\n")
            fresh.replace(marker)
            return segment
        try:
            found = json.loads(marker.read_text())
            known = found | _FORMAT == found
            size = int(found["segment"])
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise ConfigError(
                f"{marker} is not of version {_FORMAT['version']}: "
                "empty the folder, or choose another path"
            )
        return size
