"""A process that writes into another's memory by NIXL, and no more: what `wire: nixl` cannot go
below. It reads a card and then a byte for each round from its input, 256 MiB each, in objects of 32
MiB and writes of 4; a byte comes back when NIXL says that all are through.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

NBYTES, OBJECT, PIECE = 256 << 20, 32 << 20, 4 << 20
NAP = 0.0002


def main() -> None:
    from tierloom.stages.tiers.landing.region import LandingRegion
    from tierloom.stages.tiers.nixl.agent import Agent

    region = LandingRegion(NBYTES)
    bytes_in(region)[:] = bytearray(os.urandom(4096) * (NBYTES // 4096))
    agent = Agent("UCX", {}, region, shared=False, polled=True)
    sys.stdout.write("\n")
    sys.stdout.flush()
    card: dict[str, Any] = json.loads(sys.stdin.readline())
    other = agent.meet(bytes.fromhex(card["metadata"]))
    while sys.stdin.readline():
        for first in range(0, NBYTES, OBJECT):
            left = []
            for at in range(first, first + OBJECT, PIECE):
                rows = [(card["address"] + at, PIECE, 0)]
                left.append(
                    agent.begin("WRITE", rows, "DRAM", region.address + at, other=other, note=b"n")
                )
            while left := [transfer for transfer in left if not transfer.done()]:
                time.sleep(NAP)
        sys.stdout.write("\n")
        sys.stdout.flush()


def bytes_in(region: Any) -> memoryview:
    import ctypes

    return memoryview((ctypes.c_uint8 * region.total).from_address(region.address)).cast("B")


if __name__ == "__main__":
    main()
