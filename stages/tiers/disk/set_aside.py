"""Set aside: what cannot be used in a disk tier's folder gets another name in it, and is kept.

A folder of a later format, one whose marker was damaged, something else by the name of one of our
files: none of them may stop an engine from starting, and none of them is ours to delete.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

log = logging.getLogger(__name__)

_EXACT = re.compile(
    r"segment-(\d{5}|[1-9]\d{5,})\.slab|index-(\d{8}|[1-9]\d{8,})\.(log|snap|tmp)|tierloom\.(json|tmp)"
)
"""What a disk tier's files are called."""


def ours(folder: Path) -> list[Path]:
    """What has the name of one of our files. Other names are in nobody's way."""
    return [path for path in folder.iterdir() if _EXACT.fullmatch(path.name)]


def numbers(folder: Path, kind: str, suffix: str) -> list[int]:
    """Of our files `KIND-NUMBER.SUFFIX`, in order."""
    names = (path.name for path in ours(folder))
    ending = f".{suffix}"
    return sorted(
        int(name.removeprefix(f"{kind}-").removesuffix(ending)) for name in names
        if name.startswith(f"{kind}-") and name.endswith(ending)
    )  # fmt: skip


def set_aside(folder: Path, paths: Iterable[Path], label: str, why: str) -> None:
    """Move what lies in `folder` into another in it, in the place of what had the same label: so
    two versions that take turns do not fill the disk. Raises OSError."""
    there = folder / f"set-aside-{label}"
    begun = there.with_suffix(".tmp")  # goes on with what a killed process has begun
    begun.mkdir(mode=0o700, exist_ok=True)
    for path in paths:
        path.rename(begun / path.name)
    if there.exists():
        shutil.rmtree(there)
    begun.rename(there)
    log.warning("disk tier at %s: %s; see %s, and delete it when you like", folder, why, there)
