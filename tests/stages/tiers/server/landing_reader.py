"""A process with memory to land in, that does what it is told: a line of JSON in, one out."""

from __future__ import annotations

import asyncio
import ctypes
import json
import sys
from typing import Any

from tierloom.stages.tiers.landing.receiver import Receiver

NBYTES = 64 << 20


async def main() -> None:
    receiver = Receiver(NBYTES, b"n" * 32, "UCX", {})
    while not receiver.ready:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    for line in sys.stdin:
        told: dict[str, Any] = json.loads(line)
        answer: Any = None
        card, region = receiver.card, receiver._region
        assert card is not None
        assert region is not None
        if "lease" in told:
            ctypes.memset(region.address, 0, told["lease"])
            landing = receiver.lease(told["lease"])
            assert landing is not None
            receiver.post(lambda: None)  # wakes it: it polls while there is a place
            answer = [card.name, card.address, card.nbytes, card.metadata.hex()]
            answer += [landing.place, landing.ticket]
        elif "count" in told:
            found = ctypes.string_at(region.address, NBYTES)
            answer = found.count(bytes([told["count"]]))
        elif "free" in told:
            for each in list(receiver._live.values()):
                receiver.free(each)
        print(json.dumps(answer), flush=True)
    receiver.close()


if __name__ == "__main__":
    asyncio.run(main())
