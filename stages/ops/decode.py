"""decode: encoded frames back to plain KV, by what each frame's header names.

    grow: {use: decode}

With `keys: [FILE]`, encrypted frames too. A frame is verified before it is decoded, and that alone
tells what is damaged: bytes that are as they were written, but cannot be decoded here, are left to
those who can. Plain frames pass untouched: scatter verifies those.
"""

from __future__ import annotations

from dataclasses import dataclass

import xxhash

from tierloom.stages.codecs.contract.decoding import decode_frame, undo
from tierloom.stages.codecs.contract.frame_shape import Bytes, FrameShape, Site
from tierloom.stages.codecs.contract.keyring import Keyring
from tierloom.stages.contract.batch import Batch
from tierloom.stages.contract.chunks import Chunk
from tierloom.stages.contract.stage import BatchStage, Context
from tierloom.stages.errors import ArenaFull, BadObject, Damaged, Lost
from tierloom.stages.kv.object import Object


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeOptions:
    """Where keys and calibrations are; all else is in the frames."""

    keys: list[str] | None = None
    """Key files of `aesgcm`, any of which may open a frame."""
    calibrations: list[str] | None = None
    """Files of `tierloom calibrate` that lie elsewhere than in ~/.cache/tierloom/calibrations."""


class Decode(BatchStage):
    """Decodes into a second lease, so that what was read can still be promoted as it is."""

    Options = DecodeOptions
    takes = "any@any/frame"
    gives = "kv@host/frame"
    leases = 1

    def __init__(self, options: DecodeOptions, ctx: Context) -> None:
        """Raises ConfigError where a key file or calibration cannot be used."""
        super().__init__(options, ctx)
        if options.calibrations:
            from tierloom.stages.codecs.cachegen import (
                calibration,  # brings numba, which checking a file must not
            )

            for path in options.calibrations:
                calibration.read_calibration(path)
        self._keys = Keyring.read(options.keys) if options.keys else None

    async def prepare(self, batch: Batch) -> None:
        for chunk in batch.live:
            if chunk.object is None or chunk.plain is not None:
                continue
            header = chunk.object.header
            if not any(f.codecs for f in header.frames):
                continue
            raw = [f.raw for f in header.frames[: header.groups]]
            plain = header.with_frames(raw, raw)
            arena = self.ctx.arena
            if not chunk.room and not batch.reserve(arena, plain.nbytes):
                batch.lose(chunk, Lost.NO_ROOM)
                continue
            try:
                lease = arena.lease(plain.nbytes)
            except ArenaFull:
                batch.lose(chunk, Lost.NO_ROOM)
                continue
            batch.defer(lease.release)
            chunk.plain = Object(plain, lease)

    def is_quick(self, item: Batch) -> bool:
        """Nothing is encoded."""
        return all(chunk.plain is None for chunk in item.live)

    def apply(self, batch: Batch) -> None:
        for chunk in batch.live:
            if chunk.plain is None or batch.request.memory.stop[0]:
                continue
            try:
                for i in batch.frames_of(chunk.plain.header):
                    self._decode(chunk, i)
            except BadObject as error:
                batch.refuse(chunk, error)

    def _decode(self, chunk: Chunk, i: int) -> None:
        """Verify and decode a layer group, as fine as its scans have come, into the plain object.
        Raises BadObject."""
        assert chunk.object is not None
        assert chunk.plain is not None
        header, plain = chunk.object.header, chunk.plain.header.frames[i]
        shape, first = FrameShape.of(header, i), header.frames[i].codecs
        whole = 0 if header.scans == 1 else 1
        scans = [
            self._opened(chunk.object, j, shape, whole)
            for j in range(i, chunk.object.loaded, header.groups)
        ]
        data = scans[0] if len(scans) == 1 else b"".join(scans)
        out = decode_frame(data, shape, first[:whole])
        chunk.plain.lease.view[plain.offset : plain.offset + plain.stored] = out

    def _opened(self, object: Object, i: int, shape: FrameShape, down_to: int) -> Bytes:
        """A frame, verified, without its codecs but the first `down_to`. Raises BadObject."""
        stored = object.header.frames[i]
        data = object.lease.view[stored.offset : stored.offset + stored.stored]
        if xxhash.xxh3_64_intdigest(data) != stored.checksum:
            raise Damaged(f"frame {i} checksum does not match")
        site = Site(object.header, i, b"", self._keys)
        return undo(data, shape, stored.codecs, site, down_to=down_to)
