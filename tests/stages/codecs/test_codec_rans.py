"""rans: exact whatever the bits, smaller where bytes are floats of a model, and hostile bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bounds import fuzz_with_bounds_checks
from hypothesis import given, strategies as st

from tierloom.stages.codecs.contract.decoding import RANS, decode_frame
from tierloom.stages.codecs.contract.encode import Encode
from tierloom.stages.codecs.contract.frame_shape import FrameShape, sized
from tierloom.stages.codecs.lossless import rans_side
from tierloom.stages.codecs.lossless.rans import _HEAD, Rans, _parts, _read_head
from tierloom.stages.options import NoOptions
from tierloom.testing import CodecContract, noise

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
STRANGE = [0.0, -0.0, float("nan"), -float("nan"), float("inf"), -float("inf")]


class TestRans(CodecContract):
    lossless = True
    per_element = 0  # a few tokens of noise take more

    def encoder(self) -> Encode:
        return Rans(NoOptions(), None)

    def test_bits_of_numbers_like_those_of_a_model(self) -> None:
        frame, _ = self.there_and_back(noise(2, 4, 256, 3, 64).bfloat16())
        assert frame.codecs == bytes((RANS,))
        assert 8 * len(frame.data) < 10.7 * 2 * 4 * 256 * 3 * 64

    @pytest.mark.parametrize("dtype", BITS, ids=str)
    def test_strange_numbers_among_others(self, dtype: torch.dtype) -> None:
        x = noise(2, 2, 64, 2, 64).to(dtype)
        flat = x.view(-1)
        flat[100 : 100 + len(STRANGE)] = torch.tensor(STRANGE, dtype=dtype)
        flat.view(BITS[dtype])[200:300] = torch.arange(1, 101, dtype=BITS[dtype])  # denormals
        frame, y = self.there_and_back(x)
        assert frame.codecs
        assert torch.equal(y.view(BITS[dtype]), x.view(BITS[dtype]))

    def test_more_kinds_of_numbers_than_symbols(self) -> None:
        """Rare ones are escapes; a frame of bits without any order passes as it is."""
        x = noise(2, 2, 256, 2, 64).bfloat16()
        rare = torch.arange(0, 1 << 16, 64, dtype=torch.int32).to(torch.int16)
        x.view(torch.int16).view(-1)[5 : 5 + 7 * len(rare) : 7] = rare
        frame, _ = self.there_and_back(x)
        assert frame.codecs
        escapes = _HEAD.unpack_from(frame.data)[5]
        assert 0 < escapes <= 1024 - 255
        every = torch.randint(-(1 << 15), 1 << 15, x.shape, dtype=torch.int16)
        frame, _ = self.there_and_back(every.view(torch.bfloat16))
        assert not frame.codecs

    def test_escapes_beyond_the_frame_are_refused(self) -> None:
        x = noise(1, 1, 256, 1, 128).bfloat16()
        rare = torch.arange(0, 1 << 16, 128, dtype=torch.int32).to(torch.int16)
        x.view(torch.int16).view(-1)[:: 32768 // 512] = rare
        frame, shape, site = self.encode(x)
        sizes, streams = _read_head(frame.data, shape)
        assert sizes.escapes
        at = _HEAD.size + sized(_parts(shape, streams, sizes)[:2])
        broken = bytearray(frame.data)
        for where, good in ((x.numel() - 1, True), (x.numel(), False), ((1 << 32) - 1, False)):
            broken[at : at + 4] = where.to_bytes(4, "little")
            if good:
                self.decode(frame._replace(data=bytes(broken)), shape, site)
            else:
                self.refused(frame._replace(data=bytes(broken)), shape, site)

    @pytest.mark.parametrize("heads_first", [False, True])
    @pytest.mark.parametrize("blocks", [1, 3, 16])
    def test_opaque_blocks(self, heads_first: bool, blocks: int) -> None:
        """Rows are whole blocks: channels are found inside."""
        x = noise(2, 4, 16 * blocks, 3, 64).bfloat16().view(2, 4, blocks, 16, 3, 64)
        x = x.transpose(3, 4) if heads_first else x
        frame, _ = self.there_and_back(x.reshape(2, 4, blocks, 1, -1))
        assert frame.codecs
        if blocks == 16:
            assert 8 * len(frame.data) < 11 * x.numel()

    @given(data=st.binary(min_size=8, max_size=600), dtype=st.sampled_from(["bfloat16", "float32"]))
    def test_any_bytes(self, data: bytes, dtype: str) -> None:
        one = FrameShape(1, 1, 1, 1, 1, dtype)
        shape = one._replace(tokens=len(data) // one.itemsize)
        data = data[: shape.nbytes]
        made = self.encoder().squeeze(data, shape, b"")
        assert made is None or bytes(decode_frame(made[0], shape, made[1])) == data

    def test_behind_another_codec_it_does_nothing(self) -> None:
        shape = FrameShape(1, 1, 64, 1, 64, "bfloat16")
        assert self.encoder().squeeze(bytes(shape.nbytes), shape, b"\1") is None


@given(
    counts=st.lists(st.integers(0, 1 << 40), min_size=1, max_size=256),
    bits=st.sampled_from([10, 11, 12]),
)
def test_frequencies_add_up_and_follow_counts(counts: list[int], bits: int) -> None:
    tables = np.array([counts, counts[::-1]], np.int64)
    freq = rans_side.freq_of(tables > 0, rans_side.levels_of(tables), bits)
    assert (freq.sum(axis=1) == 1 << bits).all()
    if tables.any():
        assert ((freq > 0) == (tables > 0)).all()


@pytest.mark.parametrize("period", [24, 192])
def test_channels_are_found_in_opaque_rows(period: int) -> None:
    rng = np.random.default_rng(0)
    means = rng.integers(20, 80, period)
    rows = rng.integers(0, 8, (16, 16, period)) + means
    plane = rows.astype(np.uint8).reshape(-1)
    assert rans_side.columns_of(plane, 16, 16 * period) == period
    assert rans_side.columns_of(plane, 256, period) == period
    still = np.zeros_like(plane)
    assert 16 * period % rans_side.columns_of(still, 16, 16 * period) == 0


@given(values=st.lists(st.integers(0, 63), max_size=100), bits=st.integers(6, 8))
def test_values_side_by_side(values: list[int], bits: int) -> None:
    made = rans_side.packed_bits(np.array(values, np.uint8), bits)
    assert len(made) == rans_side.room_for(len(values), bits)
    assert rans_side.unpacked_bits(made, len(values), bits).tolist() == values


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nothing_is_touched_outside_of_buffers(tmp_path: Path) -> None:
    fuzz_with_bounds_checks(tmp_path, "test_codec_rans:TestRans")
