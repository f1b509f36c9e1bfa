"""One object on its way into memory of ours, and on into a lease of the arena."""

from __future__ import annotations

import asyncio
import ctypes
import secrets
from collections.abc import Callable
from typing import Any

from tierloom.stages.errors import BadObject, Damaged
from tierloom.stages.kv.object import Header
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.memory.arena import Lease
from tierloom.stages.tiers.landing.landing_protocol import PIECE
from tierloom.stages.tiers.landing.region import LandingRegion

CopyHashed = Callable[[int, int, int], int]


class Landing:
    """A place for one object's bytes `begin` to `end`. Of the thread, once it was expected."""

    __slots__ = (
        "abandoned", "arrived", "begin", "doubt", "end", "failure", "frame", "front", "header",
        "key", "lease", "loaded", "loop", "nbytes", "offset", "on_fence", "place", "posted",
        "region", "result", "room", "said", "ticket",
    )  # fmt: skip

    def __init__(self, region: LandingRegion, offset: int, room: int) -> None:
        self.region, self.offset, self.room = region, offset, room
        self.ticket = secrets.randbits(64)
        self.place = region.address + offset
        self.key = b""
        self.begin = self.end = self.loaded = self.nbytes = 0
        self.arrived: set[int] = set()
        self.front, self.frame = 0, -1
        """Pieces that have come one after another; the next frame to be copied, -1: the first."""
        self.posted = self.said = -1
        """Writes that there were, to the thread and to the loop; -1: not yet known."""
        self.doubt = 0.0
        """Since when its writer should have been heard of."""
        self.abandoned = False
        self.header: Header | None = None
        self.lease: Lease | None = None
        self.failure: Exception | None = None
        self.loop = asyncio.get_running_loop()
        self.result: asyncio.Future[Header] | None = None
        self.on_fence: Callable[[], None] | None = None
        """Called on the loop when the place is taken away."""

    @property
    def over(self) -> bool:
        """Nothing is written there any more."""
        return self.posted >= 0 and len(self.arrived) >= self.posted

    def go_on(self, namespace: bytes, copy_hashed: CopyHashed) -> None:
        """Copy what has come since the last call."""
        if self.result is None or self.failure is not None or self.lease is None:
            return
        while self.front in self.arrived:
            self.front += 1
        have = min(self.begin + self.front * PIECE, self.end)
        try:
            header = self.header or self._header(namespace, have)
            if header is not None and self._copy(header, have, copy_hashed):
                self.answer(None)
        except BadObject as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Nothing more is copied, and whoever waits is told why; the first time."""
        if self.failure is None:
            self.failure = error
            self.answer(error)

    def answer(self, error: Exception | None) -> None:
        lease, self.lease = self.lease, None
        if lease is not None:
            lease.release()
        if self.result is not None:
            self._call(_resolve, self.result, error or self.header)

    def tell_fenced(self) -> None:
        if self.on_fence is not None:
            self._call(self.on_fence)

    def _copy(self, header: Header, have: int, copy_hashed: CopyHashed) -> bool:
        """Bytes up to `have` of the object have come; whether all frames have. Raises Damaged."""
        lease, base = self.lease, self.place - self.begin
        assert lease is not None
        if self.frame < 0:
            self.frame = header.boundaries.index(self.begin) if self.begin else 0
        while self.frame < self.loaded:
            frame, upto = header.frames[self.frame], header.boundaries[self.frame + 1]
            if upto > have:
                return False
            to = lease.at(frame.offset, upto - frame.offset)
            if copy_hashed(to, base + frame.offset, frame.stored) != frame.checksum:
                raise Damaged("a frame's checksum does not match")
            rest = upto - frame.offset - frame.stored
            ctypes.memmove(to + frame.stored, base + frame.offset + frame.stored, rest)
            self.frame += 1
        return True

    def _header(self, namespace: bytes, have: int) -> Header | None:
        """Of an object whose first bytes have come, and put before its frames; None: they are too
        few. Raises BadObject."""
        if have < PAGE:
            return None
        size = Header.length(self.region.bytes_at(self.offset, PAGE))
        if have < size:
            if have == self.end:
                raise Damaged(f"header cut short: {have} of {size} bytes")
            return None
        page = self.region.bytes_at(self.offset, size)
        header = Header.unpack(page, key=self.key, namespace=namespace)
        ends = (header.nbytes, *header.boundaries[self.loaded : self.loaded + 1])
        if ends != (self.nbytes, self.end):
            raise Damaged("its length contradicts its header")
        assert self.lease is not None
        self.lease.view[:size] = page
        self.header = header
        return header

    def _call(self, fn: Callable[..., None], *args: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(fn, *args)
        except RuntimeError:  # it is closed: nobody waits
            return


def _resolve(result: asyncio.Future[Header], what: Any) -> None:
    if result.done():
        return
    if isinstance(what, Exception):
        result.set_exception(what)
        result.exception()  # somebody has seen it, whether or not anybody waits
    else:
        result.set_result(what)
