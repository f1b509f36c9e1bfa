"""RANKS and its answer: which share of a model's KV each worker of an engine serves, and where.

docs/protocol.md lays them out. Nothing here does I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from tierloom.stages.tiers.server import protocol as wire

_RANK = struct.Struct("<32s4IH")
_MOST = 1024
"""Workers of one engine."""


class RankShare(NamedTuple):
    """What one worker keeps of a model's KV, and where it serves it."""

    space: bytes
    """32 bytes: the digest of its namespace."""
    layers: tuple[int, int]
    """First layer and one past the last, as the whole model counts them."""
    heads: tuple[int, int]
    """First KV head and one past the last."""
    address: str
    """As a tier `peer` names it: `tierloom://HOST:PORT`."""


def pack_ranks(ranks: Sequence[RankShare]) -> bytes:
    parts = []
    for rank in ranks:
        at = rank.address.encode()
        parts += [_RANK.pack(rank.space, *rank.layers, *rank.heads, len(at)), at]
    return b"".join(parts)


def unpack_ranks(body: bytes) -> list[RankShare]:
    """Raises BadMessage."""
    ranks: list[RankShare] = []
    at = 0
    while at < len(body):
        if len(body) - at < _RANK.size or len(ranks) == _MOST:
            raise wire.BadMessage(f"ranks of {len(body)} bytes that do not end where one does")
        space, *bounds, size = _RANK.unpack_from(body, at)
        at += _RANK.size
        text = body[at : at + size]
        first, last, low, high = bounds
        if len(text) < size or not text.isascii() or first >= last or low >= high:
            raise wire.BadMessage("a rank that contradicts itself")
        ranks.append(RankShare(space, (first, last), (low, high), text.decode()))
        at += size
    return ranks
