"""The lossy codecs: how far off they may be, and what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import fuzz_with_bounds_checks

from tierloom.stages.codecs.contract.encode import Encode
from tierloom.stages.codecs.contract.frame_shape import FrameShape, Site
from tierloom.stages.codecs.quantized.fp8 import Fp8, Fp8Options
from tierloom.stages.codecs.quantized.int4 import Int4, Int4Options
from tierloom.stages.codecs.quantized.int8 import Int8
from tierloom.stages.codecs.quantized.turboquant import TurboQuant, TurboQuantOptions
from tierloom.stages.contract.chunks import EncodedFrame
from tierloom.stages.options import NoOptions
from tierloom.testing import CodecContract, header_of, noise

ROUNDING = 2.0**-8
"""Of the result to bfloat16, relative: half of its last place, and a little."""


class TestInt8(CodecContract):
    per_element = 8 + 16 / 64 + 0.01

    def encoder(self) -> Encode:
        return Int8(NoOptions(), None)

    def check(self, x: Any, y: Any) -> None:
        scale = x.abs().amax(-1, keepdim=True) / 127
        bound = 0.5 * scale * (1 + 2**-10) + ROUNDING * x.abs() + 4e-6  # float16 is coarse there
        assert ((x - y).abs() <= bound).all()


class TestFp8(CodecContract):
    per_element = 8 + 32 / (64 * 64) * 2 + 0.02

    def encoder(self) -> Encode:
        return Fp8(Fp8Options(), None)

    def check(self, x: Any, y: Any) -> None:
        top = x.abs().amax()
        bound = (2**-4 + ROUNDING) * x.abs() + top * 2**-18 + 6e-8  # half of float16's least
        assert ((x - y).abs() <= bound).all()

    @pytest.mark.parametrize("group", [1, 3, 64, 65535])
    def test_groups(self, group: int) -> None:
        self.encoder = lambda: Fp8(Fp8Options(group=group), None)
        self.there_and_back(noise(2, 2, 130, 2, 64).bfloat16())

    def test_a_loud_token_drowns_its_own_group_only(self) -> None:
        x = noise(2, 1, 128, 2, 64)
        x[:, :, :64] *= 1e5
        _, y = self.there_and_back(x.float())
        quiet = x[:, :, 64:]
        assert ((quiet - y[:, :, 64:]).norm() / quiet.norm()) < 0.03


class TestInt4(CodecContract):
    per_element = 4 + 16 / 32 + 8 / 255 + 12 * 4 / 255 + 0.01

    def encoder(self) -> Encode:
        return Int4(Int4Options(), None)

    def check(self, x: Any, y: Any) -> None:
        kv, layers, tokens, heads, dim = x.shape
        spared = 0
        while spared < min(4, tokens) and torch.equal(x[:, :, spared], y[:, :, spared]):
            spared += 1
        mean = torch.zeros(kv, layers, 1, heads, dim)
        if tokens > spared:
            mean[0] = x[0, :, spared:].mean(1, keepdim=True).half().float()
        groups = (x - mean).reshape(kv, layers, tokens, heads * dim // 32, 32)
        span = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
        span = span[..., None].expand(groups.shape).reshape(x.shape)
        bound = 0.5 * span / 15.25 * 1.03 + ROUNDING * (x.abs() + mean.abs()) + 1e-6
        assert ((x - y).abs() <= bound).all()

    @pytest.mark.parametrize(
        ("start", "spared"), [(-1, 0), (0, 4), (2, 2), (3, 1), (4, 0), (256, 0)]
    )
    def test_the_first_tokens_of_a_sequence_are_exact(self, start: int, spared: int) -> None:
        x = noise(2, 2, 40, 2, 64).bfloat16()
        _, y = self.there_and_back(x, start)
        same = [torch.equal(x[:, :, t], y[:, :, t]) for t in range(6)]
        assert same == [True] * spared + [False] * (6 - spared)

    @pytest.mark.parametrize("tokens", [1, 3, 4, 5])
    def test_chunks_shorter_than_what_is_spared(self, tokens: int) -> None:
        self.there_and_back(noise(2, 2, tokens, 2, 64).bfloat16(), 0)

    @pytest.mark.parametrize("dim", [24, 40, 80, 100])
    def test_channels_that_fill_no_group(self, dim: int) -> None:
        x = noise(2, 2, 40, 3, dim).bfloat16()
        frame, shape, site = self.encode(x)
        y = self.decode(frame, shape, site)
        assert frame.codecs
        assert (x.float() - y.float()).norm() / x.float().norm() < 0.09

    def test_channels_far_from_zero_cost_k_nothing(self) -> None:
        x = noise(2, 2, 128, 2, 64)
        x[:, :, 0] /= 5
        far = x.clone()
        far[0] += 40 * torch.randn(64, generator=torch.Generator().manual_seed(1))
        errors = []
        for each in (x, far):
            _, y = self.there_and_back(each)
            errors.append(float((each - y)[0].norm()))
        assert errors[1] < 1.1 * errors[0]


class TestTurboQuant(CodecContract):
    per_element = 4 + 16 / 64 + 0.01
    noise_of = 0.0095
    bits = 4

    def encoder(self) -> Encode:
        return TurboQuant(TurboQuantOptions(bits=self.bits), None)  # type: ignore[arg-type]

    def check(self, x: Any, y: Any) -> None:
        """What is lost of a vector's power is what the codebook loses of a Gaussian's."""
        x, y = x.double(), y.double()
        power = x.square().sum(-1)
        clear = power > 1e-4  # else float16 is coarse where the gain is
        lost = ((x - y).square().sum(-1) / power)[clear]
        if not lost.numel() or x.abs().max() > 6e4:  # what float16 cannot hold is cut off
            return
        assert lost.max() < 6 * self.noise_of
        if lost.numel() >= 100:
            assert lost.mean() < 1.25 * self.noise_of
        assert (((y.square().sum(-1) / power)[clear] - 1).abs() < 0.01).all()  # its length stays

    def test_other_shapes_of_heads(self) -> None:
        for dim in (8, 32, 256, 1024):
            self.there_and_back(noise(2, 2, 40, 2, dim).bfloat16())

    def test_layers_and_halves_are_rotated_differently(self) -> None:
        one = torch.randn(1, 1, 1, 1, 64, generator=torch.Generator().manual_seed(0))
        x = one.expand(2, 2, 8, 1, 64).contiguous()
        _, y = self.there_and_back(x)
        different = {bytes(v.numpy().tobytes()) for v in y[:, :, 0, 0].reshape(4, 64)}
        assert len(different) == 4
        header = header_of(x)
        frame = EncodedFrame(x.numpy().tobytes(), x.numel() * 4, b"")
        shape = FrameShape.of(header, 0)
        later = shape._replace(first_layer=7)
        site = Site(header, 0, b"")
        made = [self.encoder().frame(frame, s, site).data for s in (shape, later)]
        assert bytes(made[0]) != bytes(made[1])


class TestTurboQuant3(TestTurboQuant):
    hostile = 5_000
    per_element = 3 + 16 / 64 + 0.01
    noise_of = 0.0345
    bits = 3


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nothing_is_touched_outside_of_buffers(tmp_path: Path) -> None:
    lossy = ("TestInt8", "TestFp8", "TestInt4", "TestTurboQuant", "TestTurboQuant3")
    mine = [f"test_codec_quantizers:{name}" for name in lossy]
    fuzz_with_bounds_checks(tmp_path, *mine, "test_codec_cachegen:TestCacheGen")
