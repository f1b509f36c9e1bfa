"""XXH3-64 against the xxhash library."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings, strategies as st

from tierloom.triton_kernels.checksum.xxh3_cpu import XXH3_START, xxh3_64, xxh3_absorb, xxh3_end

DATA = np.random.default_rng(3).integers(0, 256, 1 << 20, dtype=np.uint8)


def ours(data: np.ndarray) -> int:
    return int(xxh3_64(data.ctypes.data, len(data)))


def test_every_short_length() -> None:
    for n in range(1101):
        data = DATA[n : 2 * n]
        assert ours(data) == xxhash.xxh3_64_intdigest(data.tobytes()), n


@pytest.mark.parametrize("n", [2048, 2049, 4096, 65535, 65536, 1 << 20])
def test_long(n: int) -> None:
    assert ours(DATA[:n]) == xxhash.xxh3_64_intdigest(DATA[:n].tobytes())


@settings(deadline=None, max_examples=100)
@given(start=st.integers(0, 200), n=st.integers(0, 70_000))
def test_any_length_at_any_alignment(start: int, n: int) -> None:
    data = DATA[start : start + n]
    assert ours(data) == xxhash.xxh3_64_intdigest(data.tobytes())


@settings(deadline=None, max_examples=50)
@given(
    total=st.one_of(st.integers(241, 9000), st.integers(4, 140).map(lambda n: n * 64)),
    cuts=st.lists(st.integers(0, 140)),
)
def test_in_pieces(total: int, cuts: list[int]) -> None:
    ends = sorted({min(cut * 64, total) for cut in cuts} | {total})
    lanes, start = XXH3_START, 0
    for end in ends:
        piece = DATA[start:end].copy()
        lanes = xxh3_absorb(lanes, piece.ctypes.data, start, len(piece), total)
        lanes = tuple(np.uint64(lane) for lane in lanes)  # Python's ints would come back as int64
        start = end
    last = DATA[total - 64 : total]
    expected = xxhash.xxh3_64_intdigest(DATA[:total].tobytes())
    assert int(xxh3_end(lanes, last.ctypes.data, total)) == expected


@pytest.mark.parametrize("n", [1, 3, 8, 16, 100, 200, 1024, 5000])
def test_every_byte_counts(n: int) -> None:
    data = DATA[:n].copy()
    seen = {ours(data)}
    for i in range(n):
        data[i] ^= 0x10
        seen.add(ours(data))
        data[i] ^= 0x10
    assert len(seen) == n + 1


def test_compiled_code_is_kept_for_the_next_process() -> None:
    ours(DATA[:1])
    code = (
        "from tierloom.triton_kernels.checksum.xxh3_cpu import xxh3_64\n"
        "xxh3_64(0, 0)\n"
        "print(sum(xxh3_64.stats.cache_hits.values()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
