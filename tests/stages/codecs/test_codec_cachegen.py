"""cachegen: how far off it may be, what it costs, and what becomes of its frames elsewhere."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import torch

from tierloom.stages.codecs.cachegen import paper as cachegen_paper
from tierloom.stages.codecs.cachegen.codebook import standard
from tierloom.stages.codecs.cachegen.coder import HEAD, CodedHead
from tierloom.stages.codecs.cachegen.paper import most_of
from tierloom.stages.codecs.cachegen.stage import LEVELS, CacheGen, CacheGenOptions
from tierloom.stages.codecs.contract.encode import Encode
from tierloom.stages.codecs.contract.frame_shape import FrameShape
from tierloom.stages.errors import BadObject
from tierloom.stages.kv.rope import frequencies
from tierloom.testing import CodecContract, noise

ROPE = '{"rope_type": "default", "rope_theta": 10000.0}'

LLAMA3 = (
    '{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,'
    ' "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}'
)


def turned(x: torch.Tensor, start: int) -> torch.Tensor:
    """K as attention reads it, of K before the position embedding, as transformers turns it."""
    freqs = torch.from_numpy(frequencies(ROPE, x.shape[-1]))
    angles = torch.arange(start, start + x.shape[2])[:, None] * freqs
    cos, sin = (torch.cat([f, f], -1)[None, None, :, None] for f in (angles.cos(), angles.sin()))
    a, b = x.chunk(2, -1)
    return torch.cat([x[:1] * cos + torch.cat([-b, a], -1)[:1] * sin, x[1:]])


class TestCacheGen(CodecContract):
    """Without a calibration; `step` is the level's, of a plane's deviation."""

    level = "default"
    step = 0.39
    per_element = 3.8

    def encoder(self) -> Encode:
        made = CacheGen(CacheGenOptions(level=self.level), None)  # type: ignore[arg-type]
        made._freqs = frequencies(ROPE, 64)
        return made

    def check(self, x: Any, y: Any) -> None:
        """Half a step for each of two channels that are turned together."""
        spared = 0
        while spared < min(4, x.shape[2] - 1) and torch.equal(x[:, :, spared], y[:, :, spared]):
            spared += 1
        x, y = x[:, :, spared:].double(), y[:, :, spared:].double()
        spread = x.var((2, 3, 4), correction=0, keepdim=True).sqrt()  # no less than the channels'
        bound = 0.5 * self.step * spread * 2**0.5 * 1.01 + 2**-8 * x.abs().amax() * 1.5 + 1e-6
        assert ((x - y).abs() <= bound).all()


class TestHigh(TestCacheGen):
    hostile = 5_000
    level = "high"
    step = 0.13
    per_element = 5.4


class TestSmall(TestCacheGen):
    hostile = 5_000
    level = "small"
    step = 0.85
    per_element = 2.85


class TestPaper(CodecContract):
    """CacheGen's own quantizer: half of a token's largest number over the largest symbol."""

    level = "paper-3"
    per_element = 4.3

    def encoder(self) -> Encode:
        return CacheGen(CacheGenOptions(level=self.level), None)  # type: ignore[arg-type]

    def check(self, x: Any, y: Any) -> None:
        tops = x.abs().amax((3, 4), keepdim=True).double()
        most = most_of(self.level, FrameShape(*x.shape, "float32"), 0, x.shape[1])
        bound = 0.5 * tops / torch.from_numpy(most).view(*x.shape[:2], 1, 1, 1)
        assert ((x.double() - y.double()).abs() <= bound * 1.001 + 2**-8 * tops + 1e-6).all()


class TestPaper2(TestPaper):
    hostile = 5_000
    level = "paper-2"
    per_element = 3.7


class TestPaper1(TestPaper):
    hostile = 5_000
    level = "paper-1"
    per_element = 3.0


@pytest.mark.parametrize("level", cachegen_paper.BINS)
def test_bins_of_the_paper(level: str) -> None:
    """Of Mistral-7B, 32 layers, as its artifact has them; of others in the same shares."""
    shape = FrameShape(2, 4, 1, 1, 1, "bfloat16")
    most = [most_of(level, shape, i, 32).tolist() for i in range(0, 32, 4)]
    k, v = ([2 * m + 2 for row in most for m in row[at]] for at in (slice(4), slice(4, 8)))
    assert (k, v) == {
        "paper-3": ([32] * 32, [32] * 32),
        "paper-2": ([32] * 10 + [16] * 22, [32] * 2 + [16] * 30),
        "paper-1": ([16] * 20 + [12] * 12, [16] * 2 + [12] * 30),
    }[level]
    deep = most_of(level, shape._replace(layers=80), 0, 80).tolist()  # 2.5 times as many
    assert [2 * m + 2 for m in deep[:80]] == [k[2 * i // 5] for i in range(80)]


def test_a_symbol_more_than_the_paper_has_is_refused() -> None:
    case = TestPaper()
    frame, shape, site = case.encode(noise(2, 1, 40, 2, 64).bfloat16(), 0)
    data, at = bytearray(frame.data), len(frame.data) - 2 * (1 + 2 * 40 + 2 * 128)
    assert data[at : at + 2] == bytes((15, 15))
    data[at] = 0
    case.refused(frame._replace(data=bytes(data)), shape, site)
    data[at : at + 4] = bytes((15, 15, 0x80, 0x7F))  # the first scale: infinite
    case.refused(frame._replace(data=bytes(data)), shape, site)


def test_a_level_of_the_future_is_refused() -> None:
    case = TestCacheGen()
    frame, shape, site = case.encode(noise(2, 1, 40, 2, 64).bfloat16(), 0)
    data = bytearray(frame.data)
    data[1] = len(LEVELS)
    with pytest.raises(BadObject, match="level 6 is unknown"):
        case.decode(frame._replace(data=bytes(data)), shape, site)


def test_k_turned_back_is_closer_for_the_same_bits() -> None:
    """The deviation around the means is less. The decoder finds the position in the frame."""
    plain = noise(2, 2, 256, 2, 64)
    x = turned(plain, 768).bfloat16()
    sizes, errors = [], []
    for start in (-1, 768):
        frame, y = TestCacheGen().there_and_back(x, start)
        sizes.append(len(frame.data))
        errors.append(float((x.float() - y.float())[0].norm()))
    assert sizes[1] < 1.05 * sizes[0]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("start", [0, 2, 3, 4, 256])
def test_the_first_tokens_of_a_sequence_are_exact(start: int) -> None:
    x = noise(2, 2, 40, 2, 64).bfloat16()
    _, y = TestCacheGen().there_and_back(x, start)
    same = [torch.equal(x[:, :, t], y[:, :, t]) for t in range(6)]
    spared = max(4 - start, 0)
    assert same == [True] * spared + [False] * (6 - spared)


def test_side_data_at_256_tokens() -> None:
    """All but words and spared tokens: at most 0.12 bits an element, on a small model's frame."""
    x = noise(2, 4, 256, 3, 64).bfloat16()
    frame, _, _ = TestCacheGen().encode(x, 256)
    words = CodedHead(*HEAD.unpack_from(frame.data)).words
    assert 8 * (len(frame.data) - 2 * words) <= 0.12 * x.numel()


def test_escapes() -> None:
    """What lies beyond the tables' reach comes back in its place."""
    x = noise(2, 2, 256, 2, 64).bfloat16()
    x[1, 1, 100, 1, 7], x[0, 0, 9, 0, 0], x[1, 0, 255, 1, 63] = 400, -900, 1000
    frame, y = TestCacheGen().there_and_back(x, 256)
    assert CodedHead(*HEAD.unpack_from(frame.data)).escapes >= 3
    assert (x - y).abs().max() < 8


def test_tables_are_the_format_and_never_change() -> None:
    """Frames name them by number: other tables could not read what is kept."""
    freq = standard().tables.freq_cdf & 0xFFFF
    assert sha256(freq.astype("<u2").tobytes()).hexdigest()[:16] == "2bad1b0d1f95405c"


@pytest.mark.parametrize(
    "parameters",
    [
        '{"rope_type": "default", "rope_theta": 10000.0}',
        '{"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}',
        '{"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}',
        LLAMA3,
        json.dumps({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                    "original_max_position_embeddings": 2048}),
        json.dumps({"rope_type": "yarn", "rope_theta": 1.5e5, "factor": 32.0, "beta_fast": 16.0,
                    "beta_slow": 2.0, "truncate": False, "original_max_position_embeddings": 4096}),
        json.dumps({"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0,
                    "original_max_position_embeddings": 2048,
                    "short_factor": [1 + i / 8 for i in range(32)],
                    "long_factor": [1 + i / 8 for i in range(32)]}),
    ],
)  # fmt: skip
def test_frequencies_are_those_of_transformers(parameters: str) -> None:
    transformers = pytest.importorskip("transformers")
    rope = json.loads(parameters)
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=rope
    )
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    wanted = LlamaRotaryEmbedding(config).inv_freq.numpy()
    if "partial_rotary_factor" in rope:  # a llama has none
        wanted = 10000.0 ** -(np.arange(0, 32, 2) / 32)
    np.testing.assert_allclose(frequencies(parameters, 64), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    "parameters",
    ["", "{}", "[]", "no json", '{"rope_type": "yarn", "rope_theta": 1e4}', '{"rope_theta": "x"}',
     '{"rope_type": "yarn", "rope_theta": 1e4, "factor": null, "beta_fast": 16.0}',
     '{"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [2.0]}',
     '{"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1, 2], "long_factor": [1, 2]}',
     '{"rope_theta": 0}', '{"rope_theta": 1e4, "partial_rotary_factor": 9}', '{"rope_theta": {}}'],
)  # fmt: skip
def test_unknown_embeddings_are_left_alone(parameters: str) -> None:
    assert len(frequencies(parameters, 64)) == 0
