"""The lossless codecs, and the table: exact inverses, whatever the bytes, and damage refused."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, strategies as st

from tierloom.stages.codecs.contract import decoding as table
from tierloom.stages.codecs.contract.byte_planes import join_planes, split_planes
from tierloom.stages.codecs.contract.encode import Encode
from tierloom.stages.codecs.contract.frame_shape import FrameShape
from tierloom.stages.codecs.lossless.lz4 import Lz4, Lz4Options
from tierloom.stages.codecs.lossless.zstd import Zstd, ZstdOptions
from tierloom.stages.errors import BadObject
from tierloom.testing import CodecContract

ENCODERS = [
    Zstd(ZstdOptions(), None), Zstd(ZstdOptions(level=9, planes=False), None),
    Lz4(Lz4Options(), None), Lz4(Lz4Options(planes=False), None),
]  # fmt: skip


class Lossless(CodecContract):
    lossless = True
    per_element = 0  # short frames of noise do not shrink


class TestZstd(Lossless):
    def encoder(self) -> Encode:
        return ENCODERS[0]


class TestLz4(Lossless):
    def encoder(self) -> Encode:
        return ENCODERS[2]

    def test_lengths_that_cannot_be_right(self) -> None:
        """lz4 does not notice a cut at a literal: frames are checksummed."""


def shaped(nbytes: int, dtype: str) -> FrameShape:
    """A frame of so many bytes."""
    one = FrameShape(1, 1, 1, 1, 1, dtype)
    return one._replace(dim=nbytes // one.itemsize)


@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda e: f"{type(e).__name__}-{e.options}")
@given(
    data=st.binary(min_size=8, max_size=400).map(lambda b: b[: len(b) // 8 * 8]),
    dtype=st.sampled_from(["uint8", "bfloat16", "float32", "float64"]),
)
def test_what_comes_out_is_what_went_in(encoder: Zstd | Lz4, data: bytes, dtype: str) -> None:
    shape = shaped(len(data), dtype)
    packed, codecs = encoder.squeeze(data, shape, b"")
    assert bytes(table.decode_frame(packed, shape, codecs)) == data
    again, more = encoder.squeeze(packed, shape, codecs)
    if len(again) < len(data):
        assert bytes(table.decode_frame(again, shape, codecs + more)) == data


def test_every_decoder_is_there_and_has_a_name() -> None:
    for codec in table.CODECS:
        assert callable(table.decoder(codec))
    names = {c.name: c.id for c in table.CODECS.values()}
    assert names == {
        "planes": 1, "zstd": 2, "lz4": 3, "fp8": 4, "int8": 5, "int4": 6, "turboquant": 7,
        "rans": 8, "cachegen": 9, "aesgcm": 10, "progressive": 11,
    }, "ids are part of the format"  # fmt: skip


def test_planes_put_equal_bytes_side_by_side() -> None:
    assert split_planes(b"aAbBcC", 2) == b"abcABC"
    assert join_planes(b"abcABC", shaped(6, "bfloat16")) == b"aAbBcC"


def test_planes_pay_on_bf16() -> None:
    rng = np.random.default_rng(0)
    kv = (
        (rng.standard_normal(65536).astype(np.float32).view(np.uint32) >> 16)
        .astype(np.uint16)
        .tobytes()
    )
    with_planes, _ = ENCODERS[0].squeeze(kv, shaped(len(kv), "bfloat16"), b"")
    without, _ = ENCODERS[1].squeeze(kv, shaped(len(kv), "bfloat16"), b"")
    assert len(with_planes) < 0.85 * len(kv)
    assert len(with_planes) < len(without)


@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda e: f"{type(e).__name__}-{e.options}")
def test_damage_is_refused(encoder: Zstd | Lz4) -> None:
    data = bytes(range(256)) * 8
    packed, codecs = encoder.squeeze(data, shaped(2048, "bfloat16"), b"")
    for raw, length, chain in (
        (packed[:-3], len(data), codecs), (b"", len(data), codecs), (packed, len(data) - 2, codecs),
        (packed, len(data), codecs + b"\x63"), (packed, len(data), codecs[:-1]),
    ):  # fmt: skip
        with pytest.raises(BadObject):
            table.decode_frame(raw, shaped(length, "bfloat16"), chain)


def test_a_claim_of_much_takes_no_memory() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    unsaid = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 26))
    tracemalloc.start()
    for data in (bomb, unsaid):
        with pytest.raises(BadObject, match="claimed"):
            table.decode_frame(data, shaped(4096, "bfloat16"), bytes((table.ZSTD,)))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_codecs_of_other_versions_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(table.CODECS, table.CACHEGEN)
    table.decoder.cache_clear()
    with pytest.raises(BadObject, match=r"codec 9 is unknown"):
        table.decode_frame(b"x", shaped(2, "bfloat16"), bytes((table.CACHEGEN,)))
