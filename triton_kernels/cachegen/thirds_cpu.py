"""Numbers in steps three times as wide, and in which third of its step each lies: numba.

A third around zero is -1, 0 or 1; away from zero thirds are counted outwards, since the third that
is nearer to zero is the more frequent. Both ways run over flat int16 arrays and hold no GIL.
"""

from __future__ import annotations

import numpy as np

from tierloom.triton_kernels.memory.machine_code import compiled

FAR = (1 << 15) - 10
"""The largest number that can be parted, or come of joining: all between stays within int16."""


@compiled(nogil=True)
def part(q, wide, third):
    """`wide` and `third` int16, flat like q int16 within +-FAR. `wide` may be q itself."""
    for i in range(len(q)):
        n = np.int32(q[i])
        m = np.int32(np.uint32(n + np.int32(33001)) // np.uint32(3)) - np.int32(11000)
        t = n - np.int32(3) * m
        wide[i] = np.int16(m)
        third[i] = np.int16(-t if m < 0 else t)


@compiled(nogil=True)
def join(q, third):
    """q int16, flat, becomes the numbers that `part` would make q and `third` of. `third` uint8,
    128 more than what `part` gives, as symbols are."""
    for i in range(len(q)):
        m = np.int32(q[i])
        t = np.int32(third[i]) - np.int32(128)
        q[i] = np.int16(np.int32(3) * m + (-t if m < 0 else t))
