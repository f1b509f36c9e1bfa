"""What codecs make of KV that somebody has at hand: bits, error and speed, without a pipeline."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from tierloom.pipeline.codec_chain import parse_codec
from tierloom.pipeline.graph_in_python import Step
from tierloom.stages import catalog
from tierloom.stages.codecs.contract.decoding import decode_frame, undo
from tierloom.stages.codecs.contract.encode import Encode
from tierloom.stages.codecs.contract.frame_shape import Bytes, FrameShape, Site
from tierloom.stages.contract.chunks import EncodedFrame
from tierloom.stages.contract.stage import ChunkOptions, Context, ModelFacts
from tierloom.stages.display.drawing import COLORS, FAINT, Drawing, table_html, wide
from tierloom.stages.errors import InputError
from tierloom.stages.kv.geometry import DTYPES, Geometry
from tierloom.stages.kv.namespace import Namespace
from tierloom.stages.kv.object import Header, plan_frames
from tierloom.stages.kv.rope import rotation

Found = TypeVar("Found")


class CodecFigures(NamedTuple):
    """One codec on one KV."""

    codec: str
    bits: float
    """Of an element, all side data counted."""
    error: float
    """Norm of the difference by the norm of the KV; 0.0: every bit came back."""
    encodes: float
    """Bytes of KV per second, one thread, this machine, this moment."""
    decodes: float


class Measured(tuple[CodecFigures, ...]):
    """The figures of each codec, in the order in which they were asked for."""

    __slots__ = ()

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for f in self:
            speeds = (f"{f.encodes / 1e6:,.0f}", f"{f.decodes / 1e6:,.0f}")
            yield f.codec, f"{f.bits:.2f}", f"{f.error:.2g}", *speeds

    def __repr__(self) -> str:
        rows = [_HEAD, *self._rows()]
        size = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([name.ljust(size[0]), *map(str.rjust, row, size[1:])]) for name, *row in rows
        )

    def _repr_html_(self) -> str:
        return table_html(_HEAD, self._rows())

    def plot(self) -> CodecPlot:
        """Error against bits, as a picture for notebooks; `.svg` is its text."""
        return CodecPlot(_scatter(self))


class CodecPlot(NamedTuple):
    """A picture."""

    svg: str

    def _repr_html_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return f"<CodecPlot of {len(self.svg):,} bytes: write .svg into a file>"


_HEAD = ("codec", "bits", "error", "encodes MB/s", "decodes MB/s")


def measure_codecs(
    kv: Any, codecs: Sequence[str], *, rope: str = "", chunk: int = 256, group: int = 4,
    rounds: int = 1,
) -> Measured:  # fmt: skip
    """Encode and decode `kv` by each of `codecs`, frame by frame as a store would.

    `kv`: a tensor [2, layers, tokens, heads, channels] on the CPU (K, then V; 1 instead of 2 for a
    latent) of a prompt from its first token on; it is not changed. `codecs`: `int4`,
    `cachegen:small`, chains `lz4+zstd`; `none`. `rope`: the model's parameters, JSON; without them
    `cachegen` cannot turn K back, and takes more bits. `chunk`, `group`: tokens and layers of a
    frame. `rounds`: how often each is done; the quickest counts. Raises InputError, ConfigError;
    LayoutError where a codec cannot take the shape.
    """
    fits = isinstance(kv, torch.Tensor) and kv.dim() == 5 and kv.shape[0] in (1, 2) and kv.numel()
    if not fits:
        seen = tuple(kv.shape) if isinstance(kv, torch.Tensor) else type(kv).__name__
        raise InputError(f"kv: wants a tensor [2, layers, tokens, heads, channels], got {seen}")
    dtype = str(kv.dtype).removeprefix("torch.")
    if dtype not in DTYPES or kv.device.type != "cpu":
        raise InputError(f"kv is {dtype} on {kv.device}; known: {', '.join(DTYPES)}, on the CPU")
    if not torch.isfinite(kv.float()).all():
        raise InputError(
            "kv holds NaN or Inf, which codecs pass on as they are: nothing to measure"
        )
    if min(chunk, group, rounds) < 1:
        raise InputError(f"chunk={chunk}, group={group}, rounds={rounds}: all must be at least 1")
    chains = [(name, _encoders(name, kv, dtype, rope)) for name in codecs]
    return Measured(
        _figures(name, chain, kv, dtype, chunk, group, rounds) for name, chain in chains
    )


def _encoders(name: str, kv: torch.Tensor, dtype: str, rope: str) -> list[Encode]:
    planes, layers, _, heads, dim = kv.shape
    names = Namespace(model="measured", rope=rope, layers=(0, layers), heads=(0, heads))
    nothing: Any = None
    geometry = Geometry(planes, layers, heads, dim, dtype, 1)
    ctx = Context(
        graph="store", chunk=ChunkOptions(), geometry=geometry,
        device="cpu", namespace=names.digest, names=names, facts=ModelFacts(layers), replica=False,
        trusted=frozenset(), arena=nothing, tiers={}, pool=nothing,
        rotation=rotation(rope, dim, layers),
    )  # fmt: skip
    made = []
    for step in parse_codec(name):
        cls = catalog.load_class("stage", step.use)
        made.append(cls(Step(step.use, **step.options).parsed, ctx))
    return made


def _figures(
    name: str, chain: list[Encode], kv: torch.Tensor, dtype: str, chunk: int, group: int,
    rounds: int,
) -> CodecFigures:  # fmt: skip
    stored, off, whole, encoding, decoding = 0, 0.0, 0.0, 0.0, 0.0
    for first in range(0, kv.shape[2], chunk):
        for layer in range(0, kv.shape[1], group):
            part = kv[:, layer : layer + group, first : first + chunk].contiguous()
            data = part.view(torch.uint8).numpy().tobytes()
            header = _header(part, dtype)
            shape = FrameShape.of(header, 0, first)._replace(first_layer=layer)
            if not first and not layer:  # compiled code is loaded by its first call
                _decode(_encode(chain, data, shape, header), shape, header)
            scans, spent = _timed(partial(_encode, chain, data, shape, header), rounds)
            encoding += spent
            stored += sum(memoryview(s.data).nbytes for s in scans)
            back, spent = _timed(partial(_decode, scans, shape, header), rounds)
            decoding += spent
            if bytes(back) != data:
                came = torch.frombuffer(bytearray(back), dtype=part.dtype).view(part.shape)
                off += float((came.double() - part.double()).square().sum())
            whole += float(part.double().square().sum())
    nbytes = kv.numel() * kv.itemsize
    error = math.sqrt(off / whole) if whole else 0.0
    return CodecFigures(name, 8 * stored / kv.numel(), error, nbytes / encoding, nbytes / decoding)


def _header(part: torch.Tensor, dtype: str) -> Header:
    """Of an object of one frame, as codecs look at it."""
    planes, layers, tokens, heads, dim = part.shape
    geometry = Geometry(planes, layers, heads, dim, dtype, 1)
    raw, name = geometry.frame_bytes(layers, tokens), bytes(32)
    return Header(
        key=name, namespace=name, parent=name, token_digest=name, tokens=tokens, grain=tokens,
        group=layers, geometry=geometry, frames=plan_frames(4096, [raw], [raw]), links=name,
    )  # fmt: skip


def _encode(
    chain: list[Encode], data: bytes, shape: FrameShape, header: Header
) -> list[EncodedFrame]:
    """The frame's scans, as the chain's stages leave them."""
    plain = EncodedFrame(data, len(data), b"")
    if not chain:
        return [plain]
    scans = chain[0].parts(plain, shape, Site(header, 0, b""))
    for stage in chain[1:]:
        scans = [stage.frame(s, shape, Site(header, i, s.codecs)) for i, s in enumerate(scans)]
    return scans


def _decode(scans: list[EncodedFrame], shape: FrameShape, header: Header) -> Bytes:
    shape = shape._replace(start=-1)
    if len(scans) == 1:
        return decode_frame(scans[0].data, shape, scans[0].codecs, Site(header, 0, b""))
    parts = [
        undo(s.data, shape, s.codecs, Site(header, i, b""), down_to=1) for i, s in enumerate(scans)
    ]
    return decode_frame(b"".join(parts), shape, scans[0].codecs[:1])


def _timed(run: Callable[[], Found], rounds: int) -> tuple[Found, float]:
    """What it returns, and the seconds of its quickest run."""
    best = math.inf
    for _ in range(rounds):
        began = time.perf_counter()
        found = run()
        best = min(best, time.perf_counter() - began)
    return found, best


def _scatter(figures: Measured) -> str:
    """Bits to the right, error upward by powers of ten; what lost nothing has its own line."""
    left, top, width, high = 62.0, 18.0, 520.0, 260.0
    lossy = [f.error for f in figures if f.error] or [0.01]
    low, up = math.floor(math.log10(min(lossy))), math.ceil(math.log10(max(lossy)))
    up = max(up, low + 1)
    most = max(16.0, *(f.bits for f in figures)) if figures else 16.0
    floor = top + high + 26
    drawing = Drawing(left + width + 150, floor + 44)
    for power in range(low, up + 1):
        y = top + (up - power) / (up - low) * high
        drawing.line((left, y), (left + width, y), color="#e4e7eb")
        drawing.text(left - 8, y + 4, f"{10.0**power:g}", size=10, color=FAINT, anchor="end")
    drawing.line((left, floor), (left + width, floor), color="#e4e7eb")
    drawing.text(left - 8, floor + 4, "lossless", size=10, color=FAINT, anchor="end")
    for bits in range(0, int(most) + 1, 2):
        x = left + bits / most * width
        drawing.line((x, floor), (x, floor + 4))
        drawing.text(x, floor + 17, str(bits), size=10, color=FAINT, anchor="middle")
    drawing.text(left + width / 2, floor + 36, "bits per element", color=FAINT, anchor="middle")
    drawing.text(8, top - 5, "error", color=FAINT)
    dots = []
    for f in figures:
        y = top + (up - math.log10(f.error)) / (up - low) * high if f.error else floor
        dots.append((left + f.bits / most * width, y))
    taken = [(x - 7, x + 7, y + 4) for x, y in dots]
    for i, (f, (x, y)) in enumerate(zip(figures, dots, strict=True)):
        color, long = COLORS[i % len(COLORS)], wide(f.codec)
        drawing.dot(x, y, color=color, title=f"{f.codec}: {f.bits:.2f} bits, error {f.error:.2g}")
        for begin, at in ((x + 9, y + 4), (x - 9 - long, y + 4), (x, y - 9), (x, y + 18)):
            end = begin + long
            crossed = [b for a, b, c in taken if abs(at - c) < 12 and begin < b and end > a]
            if begin > 0 and not crossed:
                break
        taken.append((begin, end, at))
        drawing.text(begin, at, f.codec, color=color)
    return drawing.svg()
