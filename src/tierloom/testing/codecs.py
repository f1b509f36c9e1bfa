"""What every codec promises, as tests: subclass `CodecContract`, say how its encoder is made."""

from __future__ import annotations

import contextlib
import random
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tierloom.stages.codecs.contract.decoding import decode_frame
from tierloom.stages.codecs.contract.encode import Encode
from tierloom.stages.codecs.contract.frame_shape import FrameShape, Site
from tierloom.stages.codecs.contract.keyring import Keyring
from tierloom.stages.contract.chunks import EncodedFrame
from tierloom.stages.errors import BadObject
from tierloom.stages.kv.geometry import Geometry
from tierloom.stages.kv.object import Header, plan_frames
from tierloom.testing.bench import GRAIN, NAMESPACE


class CodecContract:
    """What every codec promises. A subclass says how to make its encoder and how far off it may be;
    `keys` opens what it encrypts."""

    lossless = False
    keys: Keyring | None = None
    hostile = 100_000
    """Mutated frames to try. Fewer will do for another level of a codec that is tried so often."""
    per_element: float
    """Bits of an element of 128 x 2 x 64 that the encoded frame may take at most, bfloat16."""

    def encoder(self) -> Encode:
        raise NotImplementedError

    def check(self, x: Any, y: Any) -> None:
        """Assert that `y` float32 [kv, layers, tokens, heads, dim] is what becomes of `x`."""
        raise NotImplementedError

    def encode(self, x: Any, start: int = -1) -> tuple[EncodedFrame, FrameShape, Site]:
        """A tensor [kv, layers, tokens, heads, dim] as the stage would leave it."""
        header = header_of(x)
        data = x.contiguous().view(torch.uint8).numpy().tobytes()
        frame = EncodedFrame(data, len(data), b"")
        shape, site = FrameShape.of(header, 0, start), Site(header, 0, b"", self.keys)
        return self.encoder().frame(frame, shape, site), shape, site

    def decode(self, frame: EncodedFrame, shape: FrameShape, site: Site) -> Any:
        """The tensor again. Decoders never know where a frame starts."""
        out = decode_frame(frame.data, shape._replace(start=-1), frame.codecs, site)
        flat = torch.frombuffer(bytearray(out), dtype=getattr(torch, shape.dtype))
        return flat.view(shape.kv, shape.layers, shape.tokens, shape.heads, shape.dim)

    def there_and_back(self, x: Any, start: int = -1) -> tuple[EncodedFrame, Any]:
        frame, shape, site = self.encode(x, start)
        y = self.decode(frame, shape, site)
        if self.lossless or not frame.codecs:
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        else:
            self.check(x.float(), y.float())
        return frame, y

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("tokens", [1, 255, 256, 257])
    @pytest.mark.parametrize("start", [-1, 0, 256])
    def test_there_and_back(self, dtype: torch.dtype, tokens: int, start: int) -> None:
        x = noise(2, 2, tokens, 2, 64).to(dtype)
        frame, _ = self.there_and_back(x, start)
        assert frame.raw == x.numel() * x.itemsize
        if self.per_element and tokens > 1 and dtype == torch.bfloat16:
            assert 8 * len(frame.data) <= self.per_element * x.numel()

    @pytest.mark.parametrize(
        ("kv", "layers", "heads", "dim"), [(1, 3, 1, 512), (2, 1, 8, 128), (2, 4, 3, 64)]
    )
    def test_other_shapes(self, kv: int, layers: int, heads: int, dim: int) -> None:
        self.there_and_back(noise(kv, layers, 33, heads, dim).bfloat16(), 0)

    @pytest.mark.parametrize("name", ["uint8", "int8", "float8_e4m3fn", "float64"])
    def test_other_elements(self, name: str) -> None:
        x = noise(2, 1, 40, 2, 64).mul(50).to(getattr(torch, name))
        _, y = self.there_and_back(x)
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("at", [0, 3000, -1])
    def test_what_is_not_finite_stays_as_it_is(
        self, bad: float, dtype: torch.dtype, at: int
    ) -> None:
        x = noise(2, 1, 40, 2, 64).to(dtype)
        x.view(-1)[at] = bad
        _, y = self.there_and_back(x, 256)
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_zeros_stay_zeros(self, dtype: torch.dtype) -> None:
        x = noise(2, 2, 40, 2, 64).to(dtype)
        x[:, :, 7:9] = x[0] = x[:, :, :, 1] = 0
        _, y = self.there_and_back(x)
        if dtype == torch.float32:
            assert not y[0].any()
        _, y = self.there_and_back(torch.zeros(2, 2, 40, 2, 64, dtype=dtype))
        assert not y.any()

    @pytest.mark.parametrize(
        ("dtype", "size"),
        [
            (torch.float16, 65504), (torch.bfloat16, 6e4), (torch.float32, 6e4),
            (torch.bfloat16, 1e30), (torch.bfloat16, 3.38e38), (torch.float32, 3.4e38),
            (torch.float16, 1e-5), (torch.bfloat16, 1e-20), (torch.float32, 1e-42),
        ],
        ids=str,
    )  # fmt: skip
    def test_huge_and_tiny(self, dtype: torch.dtype, size: float) -> None:
        x = (noise(2, 1, 40, 2, 64).clamp(-3, 3) / 3 * size).to(dtype)
        x[0, 0, 5] = size
        frame, y = self.there_and_back(x)
        assert torch.isfinite(y).all()
        if size < 7e4 and self.per_element:
            assert frame.codecs, "whatever float16 can hold is encoded"

    def test_lengths_that_cannot_be_right(self) -> None:
        frame, shape, site = self.encode(noise(2, 1, 40, 2, 64).bfloat16(), 0)
        data = bytes(frame.data)
        assert frame.codecs
        for other in (b"", data[:1], data[:-1], data[: len(data) // 2], data[1:]):
            self.refused(frame._replace(data=other), shape, site)
        changes: list[dict[str, Any]] = [
            {"tokens": 41}, {"tokens": 39}, {"layers": 2}, {"heads": 3}, {"tokens": 0},
        ]  # fmt: skip
        for change in changes:
            self.refused(frame, shape._replace(**change), site)
        self.refused(frame._replace(codecs=frame.codecs + b"\xff"), shape, site)

    def refused(self, frame: EncodedFrame, shape: FrameShape, site: Site) -> None:
        with pytest.raises(BadObject):
            self.decode(frame, shape, site)

    def test_hostile_bytes(self) -> None:
        """Mutated frames: a named error, or as many bytes as there should be."""
        refused = self.fuzz(self.hostile)
        assert 0 < refused < self.hostile or self.keys is not None

    def test_hostile_bytes_take_no_memory(self) -> None:
        frame, shape, site = self.encode(noise(2, 1, 256, 2, 64).bfloat16(), 0)
        self.decode(frame, shape, site)
        tracemalloc.start()
        for data in mutations(bytes(frame.data), 200):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with contextlib.suppress(BadObject):
                decode_frame(data, shape, frame.codecs, site)
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < 4 * shape.nbytes + (1 << 16)
        tracemalloc.stop()

    def fuzz(self, count: int) -> int:
        """Decode mutated frames; how many were refused."""
        refused = 0
        for seed, start in enumerate((0, 256)):
            frame, shape, site = self.encode(noise(2, 1, 8, 1, 64).bfloat16(), start)
            shape = shape._replace(start=-1)
            for data in mutations(bytes(frame.data), count // 2, seed):
                try:
                    out = decode_frame(data, shape, frame.codecs, site)
                except BadObject:  # noqa: PERF203
                    refused += 1
                else:
                    assert memoryview(out).nbytes == shape.nbytes
        return refused


def noise(*shape: int) -> Any:
    """Numbers like those of a KV cache, always the same: channels that are off, a first token that
    is far out."""
    make = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=make)
    x[0] += 3 * torch.randn(shape[-1], generator=make)
    x[:, :, 0] *= 5
    return x


def header_of(x: Any) -> Header:
    """The header of an object of one frame that holds `x` [kv, layers, tokens, heads, dim]."""
    kv, layers, tokens, heads, dim = x.shape
    name = str(x.dtype).removeprefix("torch.")
    geometry = Geometry(kv=kv, layers=layers, heads=heads, dim=dim, dtype=name, block_tokens=1)
    raw = geometry.frame_bytes(layers, tokens)
    return Header(
        key=b"k" * 32, namespace=NAMESPACE, parent=b"p" * 32, token_digest=b"t" * 32,
        tokens=tokens, grain=GRAIN, group=layers, geometry=geometry,
        frames=plan_frames(4096, [raw], [raw]), links=b"k" * 32,
    )  # fmt: skip


def mutations(data: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Damaged copies of some bytes: flipped, overwritten, cut, lengthened, mostly at the start."""
    rng = random.Random(seed)
    for _ in range(count):
        made = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(rng.choice((min(16, len(made)), len(made))))
            made[at] = rng.choice((made[at] ^ 1 << rng.randrange(8), 0, 255, rng.randrange(256)))
        if rng.random() < 0.2:
            cut = rng.randrange(len(made))
            made = made[:cut] if rng.random() < 0.7 else made + rng.randbytes(rng.randrange(1, 40))
        yield bytes(made)
