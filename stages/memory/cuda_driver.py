"""Calls of CUDA's driver, for what torch has no function for.

Those of CUDA's runtime leave an error behind when they fail, which the engine's next launch would
take for its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tierloom.stages.errors import LayoutError


@contextmanager
def cuda_context(device: str, what: str) -> Iterator[Any]:
    """The driver, with the context of `device` (`cuda:3`), which is torch's too, as this thread's
    own meanwhile. `what` it is for, for errors. Raises LayoutError."""
    driver, number, context = cuda_driver(what), ctypes.c_int(), ctypes.c_void_p()
    index = int(device.partition(":")[2] or 0)
    driver_call(driver, what, "cuInit", ctypes.c_uint(0))
    driver_call(driver, what, "cuDeviceGet", ctypes.byref(number), ctypes.c_int(index))
    driver_call(driver, what, "cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
    try:
        driver_call(driver, what, "cuCtxPushCurrent_v2", context)
        try:
            yield driver
        finally:
            driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(number)


def cuda_driver(what: str) -> Any:
    """Raises LayoutError where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise LayoutError(f"{what} is not possible without NVIDIA's driver: {error}") from None


def driver_call(driver: Any, what: str, name: str, *args: Any) -> None:
    """Raises LayoutError where it fails."""
    code = getattr(driver, name)(*args)
    if code:
        raise LayoutError(f"{what} failed: {name} answered with code {code}")
