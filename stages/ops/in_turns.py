"""Many keys marked in a tier's index without holding the loop."""

from __future__ import annotations

from collections.abc import Callable

import anyio

KEYS = 64
"""Keys marked between two turns of the loop."""


async def mark_in_turns(mark: Callable[[list[bytes]], None], keys: list[bytes]) -> None:
    """Call `mark` with slices of `keys`, from the prompt's tail to its head."""
    for end in range(len(keys), 0, -KEYS):
        mark(keys[max(0, end - KEYS) : end])
        await anyio.lowlevel.checkpoint()
