"""Amounts as people write them."""

from __future__ import annotations

_SIZES = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def size_text(nbytes: float) -> str:
    """'1.5 GiB'."""
    for unit, name in _SIZES:
        if nbytes >= unit:
            return f"{nbytes / unit:.{3 if nbytes < 1000 * unit else 4}g} {name}"
    return f"{nbytes:.0f} B"


def time_text(seconds: float) -> str:
    """'12.3 ms'."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e6:.0f} us"
