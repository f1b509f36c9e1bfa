"""Where a span of tokens lies in an engine's block table: the only place that counts it.

An engine's blocks and our chunks need not divide each other, so a span may begin inside a block.
Whoever hands over a table hands over where.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tierloom.stages.errors import InputError


class BlockTable(NamedTuple):
    """The blocks that hold a span of tokens, in order."""

    blocks: Sequence[int]
    """Block ids; -1: not to be touched."""
    skip: int = 0
    """Tokens of the first block that lie before the span's first token."""
    spare: int = 0
    """Tokens of the span, from its first on, that are not to be touched."""

    @classmethod
    def cut(
        cls, ids: Sequence[int], size: int, start: int, end: int, *, fresh: int = 0
    ) -> BlockTable:
        """The part of `ids`, blocks of `size` tokens from token 0 on, that holds tokens `start` to
        `end`; those before `fresh` are not to be touched."""
        first, skip = divmod(start, size)
        return cls(ids[first : -(-end // size)], skip, max(0, fresh - start))

    def after(self, tokens: int, size: int) -> Sequence[int]:
        """The blocks, of `size` tokens, in which the span's tokens from `tokens` on lie."""
        return self.blocks[(self.skip + tokens) // size :]

    def split(self, parts: int, size: int) -> BlockTable:
        """The same span in blocks of `size` tokens, of which `parts` make one of this table's."""
        if parts == 1:
            return self
        blocks = np.asarray(self.blocks, np.int64)[:, None]
        small = np.where(blocks < 0, -1, blocks * parts + np.arange(parts)).reshape(-1)
        first, skip = divmod(self.skip, size)
        return BlockTable(small[first:], skip, self.spare)  # type: ignore[arg-type]

    def rows(self, tokens: int, size: int, *, native: bool) -> npt.NDArray[np.int64]:
        """What kernels take for the first `tokens` of the span, in blocks of `size` tokens: a slot
        for each token, or in native order a block for each started block; -1 is left out.

        Raises InputError where the table is too short, or where in native order the span, or what
        is spared of it, does not begin with a block.
        """
        ids = np.ascontiguousarray(self.blocks, dtype=np.int64)
        if len(ids) * size < self.skip + tokens:
            raise InputError(
                f"{len(ids)} blocks of {size} for {tokens} tokens after {self.skip} others"
            )
        if native:
            if self.skip or self.spare % size:
                raise InputError(
                    f"the span begins {self.skip} tokens into a block of {size}, "
                    f"{self.spare} tokens of it are spared: native order keeps whole blocks"
                )
            rows = ids[: -(-tokens // size)].copy()
            rows[: self.spare // size] = -1
            return rows
        slots = np.where(ids[:, None] < 0, -1, ids[:, None] * size + np.arange(size))
        slots = slots.reshape(-1)[self.skip : self.skip + tokens]
        slots[: self.spare] = -1
        return np.ascontiguousarray(slots)


def block_table(given: Any) -> BlockTable:
    """What a caller hands in as `blocks=`: a `BlockTable`, or the ids of one that begins with the
    span. Raises InputError."""
    table = given if isinstance(given, BlockTable) else BlockTable(given)
    raw = table.blocks
    ids = raw.detach().cpu().numpy() if hasattr(raw, "detach") else np.asarray(raw)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise InputError(f"blocks must be a 1-D array of integers, got {ids.ndim}-D {ids.dtype}")
    if table.skip < 0 or table.spare < 0:
        raise InputError(f"skip and spare must not be negative, got {table.skip}, {table.spare}")
    return table._replace(blocks=ids)  # type: ignore[arg-type]
