"""Whether NIXL's client is installed, which is asked without importing it."""

from __future__ import annotations

from importlib.util import find_spec

WHEELS = ("nixl", "nixl_cu13", "nixl_cu12")
"""The first picks among the others by itself."""


def has_nixl() -> bool:
    return any(find_spec(name) is not None for name in WHEELS)
