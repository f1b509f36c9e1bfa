"""Where compiled code is kept for the next process: the one place that decides.

numba keeps it beside the source or in the user's cache folder, and refuses to compile at all where
it may write to neither (an arbitrary id, a read-only root); Triton keeps it in the user's home.
Then it is kept in a folder of this user's own under the temporary one, and where there is none that
can be trusted, not at all: it is compiled again in each process. Whatever becomes of kept code, no
call fails for it.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba.core import caching


def compiled(**options: Any) -> Callable[[Any], Any]:
    """`numba.njit(**options)`, and its code is kept where it can be."""

    def decorate(function: Any) -> Any:
        made = numba.njit(**options)(function)
        if made is not function:  # as it is where NUMBA_DISABLE_JIT says so
            with suppress(RuntimeError):  # no locator: there is no place for it
                made._cache = _Kept(function)
        return made

    return decorate


def numba_folder() -> Path | None:
    """Where numba's code is kept; None: nowhere."""
    with suppress(RuntimeError):
        return Path(_Kept(numba_folder).cache_path)
    return None


def temporary_folder() -> Path | None:
    """`tierloom-UID` under the temporary folder, made if it is not there. None where others could
    put code into it, for what lies there is run."""
    try:
        above = Path(tempfile.gettempdir())
        folder = above / f"tierloom-{os.geteuid()}"
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        shared, found = above.stat(), folder.lstat()
    except OSError:
        return None
    movable = shared.st_mode & 0o022 and not shared.st_mode & stat.S_ISVTX
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return folder if ours and not movable and not found.st_mode & 0o077 else None


def settle_triton() -> None:
    """Have Triton keep its code where this user may write. Whoever set TRITON_CACHE_DIR has his
    way; called before the first kernel is compiled."""
    home = Path(os.environ.get("TRITON_HOME") or os.path.expanduser("~"))
    if "TRITON_CACHE_DIR" in os.environ or _may_write(home / ".triton" / "cache"):
        return
    if (folder := temporary_folder()) is not None:
        os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")


def _may_write(folder: Path) -> bool:
    """The folder is there for us, or can be made."""
    nearest = next((f for f in (folder, *folder.parents) if f.exists()), Path("/"))
    return folder.is_absolute() and nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


class _Temporary(caching._SourceFileBackedLocatorMixin, caching._CacheLocator):
    """numba's way to ask for a place."""

    def __init__(self, function: Any, file: str) -> None:
        self._py_file, self._lineno = file, function.__code__.co_firstlineno
        folder = temporary_folder()
        self._folder = folder and folder / "numba" / self.get_suitable_cache_subpath(file)

    def get_cache_path(self) -> str:
        return str(self._folder)

    @classmethod
    def from_function(cls, function: Any, file: str) -> Any:
        found = cls(function, file)._folder
        return super().from_function(function, file) if found is not None else None


def _locators() -> list[Any]:
    """numba's own, then ours. Without a home folder numba would take `./~` for it."""
    homeless = not os.path.isabs(os.path.expanduser("~"))
    theirs = caching.CompileResultCacheImpl._locator_classes
    return [c for c in theirs if not (homeless and "UserWide" in c.__name__)] + [_Temporary]


class _CodeFolder(caching.CompileResultCacheImpl):
    _locator_classes = _locators()

    def get_filename_base(self, fullname: str, abiflags: str) -> str:
        """Each numba has files of its own: it would write over those of another."""
        return f"{super().get_filename_base(fullname, abiflags)}-{numba.__version__}"


class _Kept(caching.FunctionCache):
    """numba's cache of one function, whose failures are misses."""

    _impl_class = _CodeFolder

    def load_overload(self, *what: Any) -> Any:
        try:
            return super().load_overload(*what)
        except Exception:  # another user's file, half of one, a disk that fails
            with suppress(Exception):
                self.flush()  # else it would stay as it is
            return None

    def save_overload(self, *what: Any) -> None:
        with suppress(Exception):  # a full disk, a folder that has gone
            super().save_overload(*what)
