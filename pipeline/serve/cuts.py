"""What a client is given of an object."""

from __future__ import annotations

from tierloom.stages.errors import Lost
from tierloom.stages.kv.object import Object
from tierloom.stages.tiers.server import protocol as wire

AHEAD = 4
"""Objects that are read, or held, at once to answer one question."""


def given_part(asked: wire.Wanted, obj: Object | Lost) -> tuple[wire.Item, memoryview]:
    """What is sent of an object: nothing where it is not the one whose first frames were sent."""
    nothing = memoryview(b"")
    if isinstance(obj, Lost):
        return wire.Item(obj, 0, 0, 0, 0), nothing
    boundaries, nbytes = obj.header.boundaries, obj.header.nbytes
    upto = min(asked.upto, len(boundaries) - 1)
    if asked.first > upto or (asked.nbytes and asked.nbytes != nbytes):
        return wire.Item(Lost.ABSENT, 0, 0, 0, 0), nothing
    begin, end = boundaries[asked.first] if asked.first else 0, boundaries[upto]
    return wire.Item(wire.DONE, upto, nbytes, begin, end), obj.lease.view[begin:end]
