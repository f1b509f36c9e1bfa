"""Encoding and decoding of frames on one core, beside a memcpy of the same plain bytes.

    python -m pytest benchmarks/bench_codecs.py

A frame of Llama-3.1-8B: four layers of 256 tokens, 8 heads of 128 channels, bfloat16, 8 MiB of
numbers like a KV cache's: Gaussian, with channels of K that are off and of different widths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from yardstick import Memcpy, measure

from tierloom.stages import catalog
from tierloom.stages.codecs.contract.decoding import decode_frame
from tierloom.stages.codecs.contract.frame_shape import FrameShape, Site
from tierloom.stages.contract.chunks import EncodedFrame
from tierloom.stages.kv.geometry import Geometry
from tierloom.stages.kv.object import Header, header_size, plan_frames

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS, FRAMES = 7, 4
CODECS = {
    "zstd": {}, "lz4": {}, "rans": {}, "fp8": {}, "int8": {}, "int4": {}, "turboquant": {},
    "cachegen high": {"level": "high"}, "cachegen default": {"level": "default"},
    "cachegen small": {"level": "small"}, "progressive high": {"level": "high"},
    "progressive default": {"level": "default"}, "progressive small": {"level": "small"},
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """A plain frame, and where it stands."""

    plain: EncodedFrame
    shape: FrameShape
    site: Site


@pytest.fixture(scope="module")
def work() -> Work:
    make = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 256, 8, 128, generator=make)
    x *= torch.randn(2, 1, 1, 8, 128, generator=make).mul(0.5).exp()
    x[0] += 3 * torch.randn(8, 128, generator=make)
    data = x.bfloat16().view(torch.uint8).numpy().tobytes()
    geometry = Geometry(kv=2, layers=4, heads=8, dim=128, dtype="bfloat16", block_tokens=1)
    header = Header(
        key=b"k" * 32, namespace=b"n" * 32, parent=b"p" * 32, token_digest=b"t" * 32, tokens=256,
        grain=32, group=4, geometry=geometry, links=b"k" * 32,
        frames=plan_frames(header_size(1, 1), [len(data)], [len(data)]),
    )  # fmt: skip
    shape = FrameShape.of(header, 0, 256)
    return Work(EncodedFrame(data, len(data), b""), shape, Site(header, 0, b""))


def made(name: str) -> Any:
    """The stage, without a pipeline."""
    cls = catalog.load_class("stage", name.partition(" ")[0])
    return cls(cls.Options(**CODECS[name]), None)


def encoded(codec: Any, work: Work) -> list[EncodedFrame]:
    parts: list[EncodedFrame] = codec.parts(work.plain, work.shape, work.site)
    return parts


@pytest.mark.parametrize("way", ["encode", "decode"])
@pytest.mark.parametrize("name", CODECS)
def test_codec(
    name: str, way: str, work: Work, memcpy: Memcpy, benchmark: BenchmarkFixture
) -> None:
    codec = made(name)
    parts = encoded(codec, work)
    data = b"".join(bytes(p.data) for p in parts)
    plain = decode_frame(data, work.shape, parts[0].codecs)
    assert np.frombuffer(plain, np.uint8).size == work.shape.nbytes

    def run(_: int) -> None:
        for _ in range(FRAMES):
            if way == "encode":
                encoded(codec, work)
            else:
                decode_frame(data, work.shape, parts[0].codecs)

    benchmark.group = f"codecs, {way}"
    nbytes = FRAMES * work.shape.nbytes
    measure(benchmark, run, nbytes=nbytes, rounds=ROUNDS, memcpy=memcpy)
    elements = work.shape.nbytes // work.shape.itemsize
    info = benchmark.extra_info
    info["bits"] = round(8 * len(data) / elements, 2)
    info["mb_per_cpu_s"] = round(1000 / info["cpu_s_per_gb"])
