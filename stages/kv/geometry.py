"""The shape of KV as it is kept, whichever engine it came from."""

from __future__ import annotations

from dataclasses import dataclass

DTYPES = {
    "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8,
    "uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip
"""Element types that can be kept, and their bytes. Their order is part of the format (from 1)."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of KV as kept: what a frame's bytes mean.

    Canonical: `[kv, layers, tokens, heads, dim]`. Native: `[kv, layers, blocks, 1, dim]`, where a
    row is one opaque block of the engine and `dim` its length in elements.
    """

    kv: int
    layers: int
    heads: int
    dim: int
    dtype: str
    block_tokens: int
    """Tokens of the engine's block in native order; 1 in canonical order, which knows no blocks."""
    native: bool = False

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (a token, or a native block) in one plane."""
        return self.heads * self.dim * self.itemsize

    def rows(self, tokens: int) -> int:
        """Rows that hold `tokens`; in native order a started block counts as a whole one."""
        return -(-tokens // self.block_tokens)

    def frame_bytes(self, layers: int, tokens: int) -> int:
        return self.kv * layers * self.rows(tokens) * self.row_bytes
