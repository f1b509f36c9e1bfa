"""The quantizers: numba against plain torch, and Triton against numba, byte for byte.

The Triton tests run twice: under the interpreter, in a child process that this file starts, and on
a CUDA device.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreter import run_interpreted
from quantize_cases import (
    Case,
    as_bytes,
    bits,
    by_numba,
    by_reference,
    by_triton,
    launch_hadamard,
    make_case,
)  # fmt: skip

from tierloom.triton_kernels.quantize import cpu as quantize_cpu, reference
from tierloom.triton_kernels.turboquant import cpu as turboquant_cpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(2, 9, 3, 64), (4, 70, 2, 32), (2, 5, 1, 96), (2, 7, 2, 20)]
"""The last fills no int4 group."""


def differing(a: dict[str, bytes], b: dict[str, bytes]) -> list[str]:
    return [name for name in a if a[name] != b[name]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("first", [0, 4])
def test_numba_as_plain_torch(dtype: torch.dtype, shape: tuple, first: int) -> None:
    case = make_case(dtype, shape, first=first, group=4)
    assert not differing(by_reference(case), by_numba(case))


@pytest.mark.parametrize(
    ("dtype", "rows"), [*((dtype, None) for dtype in DTYPES), (torch.bfloat16, 2)], ids=str
)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_as_numba(dtype: torch.dtype, shape: tuple, rows: int | None, device: str) -> None:
    case = make_case(dtype, shape, first=3, group=8)
    assert not differing(by_numba(case), by_triton(case, device, rows))


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_triton_tells_what_numba_refuses(bad: float, device: str) -> None:
    case = make_case(torch.float32, (2, 9, 2, 32))
    case.x[0, 5, 1, 7] = bad
    with pytest.raises(AssertionError, match="bad"):
        by_triton(case, device)
    x = bits(case.x).reshape(-1, 32)
    assert not quantize_cpu.int8_encode(x, np.zeros(len(x), np.int16), np.zeros(x.shape, np.int8))


def turned(dtype: torch.dtype, dim: int) -> tuple[Case, torch.Tensor]:
    case = make_case(dtype, (2, 6, 3, dim))
    signs = torch.randint(0, 2, (2, dim), generator=torch.Generator().manual_seed(dim)) * 2.0 - 1
    return case, signs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 64, 128])
@pytest.mark.parametrize("nbits", [3, 4])
def test_turboquant_as_plain_torch(dtype: torch.dtype, dim: int, nbits: int) -> None:
    case, signs = turned(dtype, dim)
    levels, bounds = turboquant_cpu.codebook(nbits)
    x = bits(case.x).reshape(2, -1, dim)
    gains, codes = np.zeros(x.shape[:2], np.int16), np.zeros((*x.shape[:2], dim * nbits // 8), "u1")
    assert turboquant_cpu.turboquant_encode(x, signs.numpy(), levels, bounds, gains, codes)
    back = np.empty_like(x)
    turboquant_cpu.turboquant_decode(codes, signs.numpy(), levels, gains, back)
    tables = torch.from_numpy(levels), torch.from_numpy(bounds)
    expected, q = reference.turboquant_encode(case.x.reshape(2, -1, dim), signs, *tables)
    assert gains.tobytes() == as_bytes(expected)
    plain = reference.turboquant_decode(q, signs, tables[0], expected, dtype)
    assert back.tobytes() == as_bytes(plain)
    if nbits == 4:
        assert codes.tobytes() == as_bytes((q[..., : dim // 2] | q[..., dim // 2 :] << 4).byte())
    else:
        word = sum(q.view(2, -1, 8, dim // 8)[:, :, i] << 3 * i for i in range(8))
        planes = [(word >> 8 * i & 255).byte() for i in range(3)]
        assert codes.tobytes() == as_bytes(torch.cat(planes, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 64, 128])
def test_hadamard(dtype: torch.dtype, dim: int, device: str) -> None:
    case, signs = turned(dtype, dim)
    x = case.x.reshape(2, -1, dim)
    gains = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(1)).half()
    raw = x.contiguous().view(torch.int32 if dtype == torch.float32 else torch.int16).to(device)
    y = torch.full(x.shape, float("nan"), device=device)
    args = signs.to(device), gains.view(torch.int16).to(device), y
    launch_hadamard(raw, *args, kind=case.kind, back=False, rows=4)
    expected = reference.hadamard(x.float() * signs[:, None])
    assert as_bytes(y) == as_bytes(expected)
    raw.fill_(-1)
    launch_hadamard(raw, *args, kind=case.kind, back=True, rows=4)
    back = (reference.hadamard(expected) * signs[:, None]) * gains.float()[..., None]
    assert as_bytes(raw) == as_bytes(reference.saturated(back, dtype))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_under_the_interpreter() -> None:
    run_interpreted(__file__, least=25)
