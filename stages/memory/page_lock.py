"""Page-locked host memory: the only memory of the host that a CUDA device may be handed.

By the driver's own calls: those of CUDA's runtime leave an error behind when they fail, which the
engine's next launch would take for its own.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tierloom.stages.errors import LayoutError
from tierloom.stages.memory.cuda_driver import cuda_context, driver_call

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

CHUNK = 16 << 30
"""Bytes of one call. One call for hundreds of GiB of small pages is refused by drivers from R580
on; a kernel may cross from one chunk to the next, a transfer of a copy engine may not."""
LEFT = 1 << 30
"""Bytes that stay free: locked pages are resident, and cannot be swapped out."""
_FLAGS = 1 | 2
"""CU_MEMHOSTREGISTER_PORTABLE: for all of the process's contexts; _DEVICEMAP: kernels use it."""

_WHAT = "page-locking host memory"

_locked: dict[int, tuple[int, list[int], str]] = {}
"""By first address: one past the last, where each chunk begins, the device."""


def lock(address: int, nbytes: int, device: str) -> None:
    """Page-lock `nbytes` from `address` for `device` (`cuda:3`), whole or not at all.

    Touches every page. Raises LayoutError where there is not enough memory or the driver refuses.
    """
    chunks: list[int] = []
    with cuda_context(device, _WHAT) as driver:
        try:
            for at in range(address, address + nbytes, CHUNK):
                size = min(CHUNK, address + nbytes - at)
                _check_room(size, f"{at - address >> 20} of {nbytes >> 20} MiB for {device}")
                driver_call(
                    driver, _WHAT, "cuMemHostRegister_v2", ctypes.c_void_p(at),
                    ctypes.c_size_t(size), ctypes.c_uint(_FLAGS),
                )  # fmt: skip
                chunks.append(at)
        except BaseException:
            for at in chunks:
                driver.cuMemHostUnregister(ctypes.c_void_p(at))
            raise
    _locked[address] = (address + nbytes, chunks, device)


def _check_room(nbytes: int, so_far: str) -> None:
    if nbytes + LEFT > (free := available()):
        raise LayoutError(
            f"page-locking host memory stopped at {so_far}: {free >> 20} MiB are free, and "
            f"{LEFT >> 20} must stay so: lower the capacity of memory tiers, or budget.arena"
        )


def unlock(address: int) -> None:
    """Undo `lock(address, ...)`. No device may be using the memory."""
    _, chunks, device = _locked.pop(address)
    with (
        suppress(LayoutError),
        cuda_context(device, _WHAT) as driver,
    ):  # it may be shutting down already
        for at in chunks:
            driver.cuMemHostUnregister(ctypes.c_void_p(at))


def is_locked(address: npt.NDArray[np.int64], nbytes: npt.NDArray[np.int64]) -> bool:
    """Each of these pieces of memory lies in one that is locked."""
    import numpy as np  # not for those who have no memory of their own

    inside = np.zeros(len(address), bool)
    for first, (end, *_) in list(_locked.items()):
        inside |= (first <= address) & (address + nbytes <= end)
    return bool(inside.all())


def available(root: Path = Path("/"), *, high: bool = False) -> int:
    """Bytes that this process may still take: of the machine, and of every control group that it
    is in (whose page cache counts as free, as in the machine's own figure). `high`: before a group
    is slowed down."""
    found = [line.split() for line in _lines(root / "proc/meminfo")]
    left = [int(words[1]) << 10 for words in found if words[0] == "MemAvailable:"]
    for line in _lines(root / "proc/self/cgroup"):
        _, kinds, path = line.split(":", 2)
        if not kinds:
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):  # in a container, only the last of them may be there
                left += _left(folder, *names)
                left += _left(folder, "memory.high", *names[1:]) if high else []
    return max(0, min(left, default=1 << 62))


def _left(folder: Path, most: str, used: str, cache: str) -> list[int]:
    """Bytes left of one group's limit; none where it has no limit."""
    limit, now = _lines(folder / most), _lines(folder / used)
    if not limit or not now or limit == ["max"]:
        return []
    words = [line.split() for line in _lines(folder / "memory.stat")]
    return [int(limit[0]) - int(now[0]) + sum(int(n) for name, n in words if name == cache)]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
