"""What splitting 16-bit floats must do, in plain torch: the oracle of the tests, and slow.

Elements are their bits as int16 [n]; see `exponent_cpu` for the meaning.
"""

from __future__ import annotations

import torch


def split(
    x: torch.Tensor, shift: int, symbol_of: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symbols uint8 [n] and the rest, uint8."""
    bits = x.int() & 0xFFFF
    low = bits & (1 << shift) - 1
    if shift == 8:
        return symbol_of[bits >> 8], low.byte()
    run = -(-len(x) // 64) * 16
    a, b, c, d = torch.nn.functional.pad(low, (0, 4 * run - len(x))).view(4, run)
    rest = [a | (d & 3) << 6, b | (d >> 2 & 3) << 6, c | (d >> 4) << 6]
    return symbol_of[bits >> 6], torch.cat(rest).byte()


def merge(
    symbols: torch.Tensor, rest: torch.Tensor, shift: int, top_of: torch.Tensor
) -> torch.Tensor:
    """The elements' bits again, int16; ``top_of`` int [256]."""
    low = rest.int()
    if shift == 6:
        a, b, c = low.view(3, -1)
        low = torch.cat([a & 63, b & 63, c & 63, a >> 6 | b >> 6 << 2 | c >> 6 << 4])
    return (top_of.int()[symbols.long()] << shift | low[: len(symbols)]).to(torch.int16)
