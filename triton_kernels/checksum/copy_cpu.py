"""A copy that hashes what it copies, so that memory is read once for both."""

from __future__ import annotations

import numpy as np

from tierloom.triton_kernels.checksum.xxh3_cpu import XXH3_START, xxh3_64, xxh3_absorb, xxh3_end
from tierloom.triton_kernels.memory.machine_code import compiled
from tierloom.triton_kernels.memory.raw import copy_bytes, publish, stream_lines

_RUN = 32768
"""Bytes after which the copy follows the hash, which has brought them into the nearest cache."""


@compiled(nogil=True)
def copy_hashed(to, source, nbytes):
    """Copy `nbytes` >= 0 bytes past the caches; returns the XXH3-64 of the source.

    `to` is a multiple of 64. The ranges must not overlap, and stay alive for the call. No GIL is
    held.
    """
    to, source = np.uint64(to), np.uint64(source)
    if nbytes <= _RUN:
        copy_bytes(to, source, nbytes)
        return xxh3_64(source, nbytes)
    lanes, done = XXH3_START, 0
    while done < nbytes:
        part = min(_RUN, nbytes - done)
        whole = part & ~63
        lanes = xxh3_absorb(lanes, source + np.uint64(done), done, part, nbytes)
        stream_lines(to + np.uint64(done), source + np.uint64(done), whole)
        at = np.uint64(done + whole)
        copy_bytes(to + at, source + at, part - whole)
        done += part
    publish()
    return xxh3_end(lanes, source + np.uint64(nbytes - 64), nbytes)
