"""Codecs: exact inverses, whatever the bytes, and damage refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierloom.stages.codecs import table
from tierloom.stages.codecs.lz4 import Lz4, Lz4Options
from tierloom.stages.codecs.zstd import Zstd, ZstdOptions
from tierloom.stages.errors import BadObject

ENCODERS = [
    Zstd(ZstdOptions(), None), Zstd(ZstdOptions(level=9, planes=False), None),
    Lz4(Lz4Options(), None), Lz4(Lz4Options(planes=False), None),
]  # fmt: skip


@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda e: f"{type(e).__name__}-{e.options}")
@given(
    data=st.binary(min_size=8, max_size=400).map(lambda b: b[: len(b) // 8 * 8]),
    itemsize=st.sampled_from([1, 2, 4, 8]),
)
def test_what_comes_out_is_what_went_in(encoder: Zstd | Lz4, data: bytes, itemsize: int) -> None:
    packed, codecs = encoder.squeeze(data, itemsize)
    assert bytes(table.decode_frame(packed, len(data), itemsize, codecs)) == data


def test_every_encoder_has_its_inverse() -> None:
    assert {e.codec for e in ENCODERS} | {table.PLANES} == set(table.DECODERS)


def test_planes_put_equal_bytes_side_by_side() -> None:
    assert table.split_planes(b"aAbBcC", 2) == b"abcABC"
    assert table.join_planes(b"abcABC", 6, 2) == b"aAbBcC"


def test_planes_pay_on_bf16() -> None:
    rng = np.random.default_rng(0)
    kv = (
        (rng.standard_normal(65536).astype(np.float32).view(np.uint32) >> 16)
        .astype(np.uint16)
        .tobytes()
    )
    with_planes, _ = ENCODERS[0].squeeze(kv, 2)
    without, _ = ENCODERS[1].squeeze(kv, 2)
    assert len(with_planes) < 0.85 * len(kv)
    assert len(with_planes) < len(without)


@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda e: f"{type(e).__name__}-{e.options}")
def test_damage_is_refused(encoder: Zstd | Lz4) -> None:
    data = bytes(range(256)) * 8
    packed, codecs = encoder.squeeze(data, 2)
    for raw, length, chain in (
        (packed[:-3], len(data), codecs), (b"", len(data), codecs), (packed, len(data) - 2, codecs),
        (packed, len(data), codecs + b"\x63"), (packed, len(data), codecs[:-1]),
    ):  # fmt: skip
        with pytest.raises(BadObject):
            table.decode_frame(raw, length, 2, chain)
