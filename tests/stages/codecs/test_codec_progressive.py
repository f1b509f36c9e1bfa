"""progressive: each of its scans, what they cost together, and scans of different frames."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from tierloom.stages.codecs.cachegen import frame as cachegen_frame, stage as cachegen
from tierloom.stages.codecs.cachegen.progressive import STEP, Progressive, ProgressiveOptions
from tierloom.stages.codecs.cachegen.stage import CacheGen, CacheGenOptions
from tierloom.stages.codecs.contract.decoding import decode_frame
from tierloom.stages.codecs.contract.encode import Encode
from tierloom.stages.codecs.contract.frame_shape import FrameShape, Site
from tierloom.stages.contract.chunks import EncodedFrame
from tierloom.stages.errors import BadObject
from tierloom.stages.kv.rope import frequencies
from tierloom.testing import CodecContract, header_of, noise
from tierloom.triton_kernels.cachegen import thirds_cpu

ROPE = '{"rope_type": "default", "rope_theta": 10000.0}'


def encoder(level: str = "high") -> Progressive:
    made = Progressive(ProgressiveOptions(level=level), None)  # type: ignore[arg-type]
    made._freqs = frequencies(ROPE, 64)
    return made


def scans_of(x: torch.Tensor, start: int = 0) -> tuple[list[EncodedFrame], FrameShape]:
    header, data = header_of(x), x.contiguous().view(torch.uint8).numpy().tobytes()
    shape = FrameShape.of(header, 0, start)
    frame = EncodedFrame(data, len(data), b"")
    return encoder().parts(frame, shape, Site(header, 0, b"")), shape


def joined(scans: list[EncodedFrame]) -> bytes:
    return b"".join(bytes(s.data) for s in scans)


def tensor(scans: list[EncodedFrame], x: torch.Tensor, shape: FrameShape) -> torch.Tensor:
    out = decode_frame(joined(scans), shape._replace(start=-1), scans[0].codecs)
    return torch.frombuffer(bytearray(out), dtype=x.dtype).view(x.shape)


class TestHigh(CodecContract):
    """All scans, one behind another."""

    level = "high"
    step = STEP / 9
    per_element = 5.6

    def encoder(self) -> Encode:
        return encoder(self.level)

    def check(self, x: Any, y: Any) -> None:
        """Half a step for each of two channels that are turned together."""
        spared = 0
        while spared < min(4, x.shape[2] - 1) and torch.equal(x[:, :, spared], y[:, :, spared]):
            spared += 1
        x, y = x[:, :, spared:].double(), y[:, :, spared:].double()
        spread = x.var((2, 3, 4), correction=0, keepdim=True).sqrt()
        bound = 0.5 * self.step * spread * 2**0.5 * 1.01 + 2**-8 * x.abs().amax() * 1.5 + 1e-6
        assert ((x - y).abs() <= bound).all()


class TestDefault(TestHigh):
    hostile = 5_000
    level = "default"
    step = STEP / 3
    per_element = 4.0


class TestSmall(TestHigh):
    hostile = 5_000
    level = "small"
    step = STEP
    per_element = 2.6


def test_each_scan_more_is_three_times_as_fine() -> None:
    x = noise(2, 4, 256, 3, 64)
    scans, shape = scans_of(x)
    assert len(scans) == 3
    error = [float((tensor(scans[:n], x, shape) - x).norm()) for n in (1, 2, 3)]
    for coarse, fine in pairwise(error):
        assert 2.5 < coarse / fine < 3.5


@pytest.mark.parametrize("start", [0, 512, -1])
def test_scans_cost_little_more_than_the_level_alone(
    monkeypatch: pytest.MonkeyPatch, start: int
) -> None:
    """And come to the very same numbers: thirds of a step are the steps of the finer level."""
    x = noise(2, 4, 256, 3, 64) * torch.linspace(-1, 1, 192).view(3, 64).exp()
    scans, shape = scans_of(x, start)
    for n in (1, 2, 3):
        step = STEP / 3 ** (n - 1)
        monkeypatch.setitem(cachegen_frame.STEPS, "high", (step, step))
        alone = CacheGen(CacheGenOptions(level="high"), None)  # type: ignore[arg-type]
        alone._freqs = frequencies(ROPE, 64)
        bits = x.contiguous().view(torch.int32).numpy().view(np.uint32)
        made = alone.quantize(bits.reshape(8, 256, 3, 64), shape)
        assert made is not None
        assert len(joined(scans[:n])) <= 1.06 * made.nbytes
        plain = cachegen.from_cachegen(made, shape._replace(start=-1))
        other = torch.frombuffer(bytearray(plain), dtype=x.dtype).view(x.shape)
        assert torch.allclose(tensor(scans[:n], x, shape), other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["uint8", "float8_e4m3fn", "bfloat16"])
def test_what_cannot_be_coded_comes_whole_with_the_first_scan(name: str) -> None:
    x = noise(2, 1, 40, 2, 64).mul(50).to(getattr(torch, name))
    if name == "bfloat16":
        x[1, 0, 7, 1, 3] = float("nan")
    scans, shape = scans_of(x)
    for n in (1, 2, 3):
        assert torch.equal(tensor(scans[:n], x, shape).view(torch.uint8), x.view(torch.uint8))
    assert sum(len(s.data) for s in scans) <= x.numel() * x.itemsize + 3 * 32


def test_scans_that_do_not_belong_together() -> None:
    x = noise(2, 2, 64, 2, 64).bfloat16()
    scans, shape = scans_of(x)
    later, _ = scans_of(x, 256)
    one, two, three = scans
    for wrong in (
        [two], [three], [one, three], [one, one], [two, one], [one, two, three, three],
        [one, later[1]], [later[0], two, three], [],
    ):  # fmt: skip
        with pytest.raises(BadObject):
            decode_frame(joined(wrong), shape, one.codecs)


def test_thirds_of_every_number() -> None:
    far = thirds_cpu.FAR
    q = np.arange(-far, far + 1, dtype=np.int16)
    wide, third = np.empty_like(q), np.empty_like(q)
    thirds_cpu.part(q, wide, third)
    assert (wide == (q.astype(np.int32) + 1) // 3).all()
    assert (np.where(wide < 0, -third, third) == q - 3 * wide.astype(np.int32)).all()
    again = q.copy()
    thirds_cpu.part(again, again, third)
    thirds_cpu.join(again, (third + 128).astype(np.uint8))
    assert (again == q).all()
