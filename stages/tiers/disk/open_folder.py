"""A disk tier's folder while it is open: the calls in it, its end, and what if it is emptied."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from tierloom.stages.errors import ConfigError, TierDown
from tierloom.stages.tiers.disk.default_folder import lock_folder
from tierloom.stages.tiers.disk.folder_lock import FolderLock
from tierloom.stages.user_home import expanded

log = logging.getLogger(__name__)

_PATIENCE = 10.0  # seconds that closing waits for calls whose callers were cancelled


class OpenFolder(ABC):
    """Thread-safe and blocking. A subclass says what is opened in the folder."""

    def __init__(self, path: str, *, segment: int, namespace: bytes) -> None:
        self._path, self._segment, self._namespace = path, segment, namespace
        self._folder = expanded(path)  # or one beside it, from `open` on
        self._lock: FolderLock | None = None
        self._resting = threading.Condition()
        self._working = 0
        self._open = self._emptied = self._beginning = False

    @abstractmethod
    def _open_in(self, lock: FolderLock) -> None:
        """Raises ConfigError, OSError."""

    @abstractmethod
    def _save_index(self) -> None:
        """Before it is closed."""

    @abstractmethod
    def _close_files(self) -> None: ...

    @abstractmethod
    def _forget_all(self) -> None:
        """Nothing is kept any more: its files are gone."""

    def open(self) -> None:
        """Lock a folder and read the index back. Raises ConfigError, TierDown, OSError.

        Idempotent: a first call whose caller was cancelled may have done it.
        """
        with self._resting:
            if self._open:
                return
            self._lock = lock_folder(self._path, segment=self._segment, owner=self._namespace)
            self._folder = self._lock.folder
            try:
                self._open_in(self._lock)
            except BaseException:  # else the next try would find the folder in use
                self._lock.release()
                raise
            self._open = True

    def close(self) -> None:
        """Make everything durable and release the folder. Waits a while for calls in progress."""
        with self._resting:
            was_open, self._open, self._emptied = self._open, False, False
            if not self._resting.wait_for(lambda: not self._working, _PATIENCE):
                # Closing a file under a thread could make it write into another file.
                log.error("disk tier at %s left open: calls do not end", self._folder)
                return
        if was_open:
            self._save_index()
            self._close_files()
        if self._lock is not None:
            self._lock.release()

    @contextmanager
    def _work(self) -> Iterator[None]:
        """Closing waits for the work inside."""
        with self._resting:
            self._resting.wait_for(lambda: not self._beginning)
            if not self._open:
                raise TierDown(f"disk tier at {self._folder} is not open")
            self._working += 1
        try:
            yield
        finally:
            with self._resting:
                self._working -= 1
                self._resting.notify_all()

    def _look_whether_emptied(self) -> None:
        """Somebody may have deleted the folder, or what is in it: go on with one that is empty,
        else what is put would be gone with the next start. Not inside `_work`. Raises TierDown."""
        if not self._is_emptied():
            return
        with self._resting:
            self._resting.wait_for(lambda: not self._beginning)
            if not self._is_emptied():
                return
            assert self._lock is not None
            if not self._lock.same_place:
                raise TierDown(
                    f"{self._folder}: another file system is mounted there than at the start"
                )
            self._beginning = True
            try:
                if not self._resting.wait_for(lambda: not self._working, _PATIENCE):
                    raise TierDown(f"{self._folder} was emptied, and calls in it do not end")
                self._begin_anew(self._lock)
            finally:
                self._beginning = False
                self._resting.notify_all()

    def _is_emptied(self) -> bool:
        lock = self._lock
        return lock is not None and (self._emptied or (self._open and not lock.holds))

    def _begin_anew(self, lock: FolderLock) -> None:
        """Nobody works meanwhile. Raises TierDown."""
        if self._open:
            log.warning("disk tier at %s: somebody emptied it; it begins anew", self._folder)
            self._open, self._emptied = False, True
            self._forget_all()
            self._close_files()
            lock.release()
        try:
            fresh = FolderLock(self._folder, segment=self._segment)
        except ConfigError as error:
            raise TierDown(str(error)) from None
        fresh.own(self._namespace)
        try:
            self._open_in(fresh)
        except (ConfigError, OSError) as error:
            fresh.release()
            raise TierDown(str(error)) from None
        self._lock, self._open, self._emptied = fresh, True, False
