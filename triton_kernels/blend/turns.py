"""What a kernel must know to turn K to another place while it copies it.

Rotary embedding turns pairs of K's channels by the token's position, so KV that was captured at one
place is right at another once K is turned by the difference (Su et al., arXiv 2104.09864). All rows
of a frame move by as many positions: a frame needs one row of cosines and sines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from tierloom.triton_kernels.memory.tables import PlaneTable

SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Element types that can be turned, and their bytes."""


@dataclass(frozen=True, slots=True)
class TurnTable:
    """How far K of each frame is turned. Of K and V (`kv` 2) the first half of the planes is K; a
    latent (`kv` 1) has its rotary channels in every plane."""

    frame: npt.NDArray[np.int32]
    """[frames] a frame's row of `cos` and `sin`; -1: copied as it is, bit for bit."""
    kind: npt.NDArray[np.int32]
    """[layers] which of a row's angles turn a layer; -1: it has no rotary embedding."""
    cos: npt.NDArray[np.float32]
    """[rows, kinds, half]"""
    sin: npt.NDArray[np.float32]
    """[rows, kinds, half]"""
    first: int
    """First channel of a head that turns; 2 * half of them do, the others are copied."""
    interleaved: bool
    """Pairs are channels 2i and 2i + 1 (GPT-J); else i and i + half (NeoX)."""
    dtype: str
    """bfloat16, float16 or float32: what a row's elements are."""


def fit(planes: PlaneTable, turn: TurnTable) -> None:
    """Raises ValueError where `turn` cannot be of `planes`: other elements (opaque blocks have
    none), more channels than a head has, other layers."""
    if SIZES.get(turn.dtype) != planes.itemsize:
        raise ValueError(
            f"K of {turn.dtype} in elements of {planes.itemsize} bytes cannot be turned: only "
            f"{', '.join(SIZES)} can, in an order of the cache whose elements are known"
        )
    if turn.first < 0 or turn.first + 2 * turn.cos.shape[2] > planes.dim:
        raise ValueError(
            f"channels {turn.first} to {turn.first + 2 * turn.cos.shape[2]} cannot turn in heads "
            f"of {planes.dim}: the rotation is of another model"
        )
    if len(turn.kind) != planes.layers:
        raise ValueError(f"a rotation of {len(turn.kind)} layers for {planes.layers} of the cache")
