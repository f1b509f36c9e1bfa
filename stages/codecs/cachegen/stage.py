"""cachegen: entropy-coded numbers, whose steps are as fine as the level wants: 2.4 to 5 bits.

    small: {use: cachegen, from: host, level: default}

Lossy. After CacheGen (Liu et al., arXiv 2310.07240), with three changes that a real model asked
for: K's rotary position embedding is undone, each channel's mean is subtracted (in place of deltas
to anchor tokens), and probabilities are not kept per chunk: a channel names one of 64 tables. Then
what remains is rounded to steps and coded by interleaved rANS (`rans_format.py`). The first tokens
of a sequence, which draw most attention and lie far out, are kept as they are.

Without a calibration of the model (`tierloom calibrate`) means and tables' numbers are in each
frame, which any config reads, with no file. With one they are the model's (`calibration.py`), and
steps are finest where attention looks: K's by its queries, V's by the projection after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tierloom.stages.codecs.cachegen import frame as cachegen_frame, paper as cachegen_paper
from tierloom.stages.codecs.cachegen.calibration import Calibration, for_model, read_calibration
from tierloom.stages.codecs.cachegen.coder import HEAD, CodedHead, grid_of, spared
from tierloom.stages.codecs.cachegen.frame import STEPS, CodedFrame, modelled
from tierloom.stages.codecs.contract.decoding import CACHEGEN
from tierloom.stages.codecs.contract.frame_shape import Bytes, FrameShape, Site
from tierloom.stages.codecs.contract.lossy import Array, Lossy, head_of
from tierloom.stages.contract.stage import Context
from tierloom.stages.errors import BadObject, ConfigError
from tierloom.stages.kv.rope import NONE, frequencies

LEVELS = (*STEPS, *cachegen_paper.BINS)
"""By number, as heads name them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheGenOptions:
    """How much may be lost."""

    level: Literal["high", "default", "small", "paper-1", "paper-2", "paper-3"] = "default"
    """About 5, 3.4 and 2.4 bits an element; KL on a small model 7e-4, 7e-3 and 3e-2 nats. Those
    of `paper` quantize as CacheGen's released code does (3 loses least), for comparison."""
    calibration: str | None = None
    """A file that `tierloom calibrate` wrote; none: that of the model, where there is one in
    ~/.cache/tierloom/calibrations. Readers need it too."""


class CacheGen(Lossy):
    """Frames as in `cachegen_frame.py`, or as in `cachegen_paper.py`, which the level says."""

    Options = CacheGenOptions
    codec = CACHEGEN

    def __init__(self, options: CacheGenOptions, ctx: Context) -> None:
        self._freqs, self._layer, self._head, self._depth = NONE, 0, 0, 0
        if ctx is not None:
            self._depth = max(ctx.facts.layers, ctx.names.layers[1])
            self._layer, self._head = ctx.names.layers[0], ctx.names.heads[0]
            self._freqs = frequencies(ctx.names.rope, ctx.geometry.dim)
        self._model = _model(options, ctx)
        super().__init__(options, ctx)

    def quantize(self, x: Array, shape: FrameShape) -> memoryview | None:
        rows = x.reshape(shape.planes, shape.tokens, shape.channels)
        layer, level = self._layer + shape.first_layer, LEVELS.index(self.options.level)
        if self.options.level in cachegen_paper.BINS:
            depth = max(self._depth, layer + shape.layers)
            most = cachegen_paper.most_of(self.options.level, shape, layer, depth)
            head = CodedHead(1, level, 0, 0, layer, self._head, 0, 0, 0, 0)
            return cachegen_paper.encoded(rows, head, shape, most)
        first = spared(shape)
        grid = grid_of(shape, first)
        if grid is None:
            return None
        known = shape.start >= 0 and shape.kv == 2  # one plane of K and V is a latent
        model = self._model if known else None
        start, id = max(shape.start, 0), model.id if model else 0
        head = CodedHead(1, level, first, 0, layer, self._head, start, 0, 0, id)
        if model:
            frame = CodedFrame(head, shape, grid, model.freqs)
            made = frame.encoded(rows, modelled(model, head, shape), ())
            if made is not None:
                return made  # else it is too far from what the model was seen to do
        freqs = self._freqs if known else NONE
        frame = CodedFrame(head._replace(half=len(freqs), calibration=0), shape, grid, freqs)
        own = frame.own(rows, freqs, STEPS[self.options.level])
        return None if own is None else frame.encoded(rows, *own)


def from_cachegen(data: Bytes, shape: FrameShape, site: Site | None = None) -> Bytes:
    """Inverse of `CacheGen.quantize`. Raises BadObject, also where a calibration is not at hand."""
    head = CodedHead(*head_of(data, HEAD, shape))
    if head.level >= len(LEVELS):
        raise BadObject(f"cachegen: level {head.level} is unknown to this tierloom")
    if LEVELS[head.level] in cachegen_paper.BINS:
        return cachegen_paper.decoded_paper(data, head, shape)
    return cachegen_frame.decoded_frame(data, head, shape)


def describe(data: bytes, codecs: bytes, scan: int) -> str:
    """The level of a frame, where only cachegen wrote it, and its calibration."""
    if len(codecs) > 1 or len(data) < HEAD.size:
        return ""
    head = CodedHead(*HEAD.unpack_from(data))
    level = LEVELS[head.level] if head.level < len(LEVELS) else f"level {head.level}"
    return f", {level}" + (f" by calibration {head.calibration:016x}" if head.calibration else "")


def _model(options: CacheGenOptions, ctx: Context | None) -> Calibration | None:
    """The calibration to encode by. Raises ConfigError where one is named that does not fit."""
    if options.calibration is not None:
        found = read_calibration(options.calibration)
        if ctx is not None and not _fits(found, ctx):
            raise ConfigError(
                f"calibration {options.calibration} is of another model: it has "
                f"{found.means.shape[1]} layers of {found.means.shape[2] // found.dim} KV heads of "
                f"{found.dim} channels; write one with tierloom calibrate"
            )
        return found
    if ctx is None:
        return None
    here = for_model(ctx.names.weights, ctx.facts.files)
    return here if here is not None and _fits(here, ctx) and _turns_alike(here, ctx) else None


def _fits(found: Calibration, ctx: Context) -> bool:
    g, n = ctx.geometry, ctx.names
    _, layers, channels = found.means.shape
    last = (n.heads[0] + g.heads) * g.dim
    return (
        g.kv == 2 and g.dim == found.dim and n.layers[0] + g.layers <= layers and last <= channels
    )


def _turns_alike(found: Calibration, ctx: Context) -> bool:
    """Whether K is turned as it was when the calibration was made, as far as the engine says."""
    freqs = frequencies(ctx.names.rope, ctx.geometry.dim)
    same = len(freqs) == len(found.freqs) and np.allclose(freqs, found.freqs)
    return not ctx.names.rope or bool(same)
