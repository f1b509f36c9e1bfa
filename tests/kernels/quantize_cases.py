"""Frames for the quantizers, and one set of calls for three implementations."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from tierloom.triton_kernels.quantize import cpu as quantize_cpu, reference
from tierloom.triton_kernels.quantize.triton import launch_fp8, launch_int4, launch_int8
from tierloom.triton_kernels.turboquant import cpu as turboquant_cpu
from tierloom.triton_kernels.turboquant.triton import launch_hadamard

BITS = {
    torch.bfloat16: (torch.int16, np.uint16), torch.float16: (torch.int16, np.int16),
    torch.float32: (torch.int32, np.uint32),
}  # fmt: skip


class Case(NamedTuple):
    """``[planes, tokens, heads, dim]``, half of the planes K."""

    x: torch.Tensor
    first: int
    """Tokens that int4 leaves alone."""
    group: int
    """Tokens of an fp8 group."""

    @property
    def kind(self) -> str:
        return str(self.x.dtype).removeprefix("torch.")


def make_case(dtype: torch.dtype, shape: tuple[int, int, int, int], **parts: int) -> Case:
    """Numbers of every size, zeros and ties among them."""
    make = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=make)
    x *= 10.0 ** torch.randint(-3, 3, shape[:3], generator=make)[..., None]
    x[0] += torch.randn(shape[-1], generator=make) * 3
    x[:, 1, 0] = torch.arange(shape[-1]) % 9 - 4  # ties, where the scale is a power of two
    x[:, -1, -1] = 0
    x[-1, 0] *= 2.0**-20
    return Case(x.to(dtype), parts.get("first", 0), parts.get("group", 64))


def bits(x: torch.Tensor) -> np.ndarray:
    """As the numba kernels take them."""
    to, kind = BITS[x.dtype]
    return x.contiguous().view(to).numpy().view(kind)


def by_reference(case: Case) -> dict[str, Any]:
    """Name: bytes, of everything that is written."""
    x, rows = case.x, case.x.flatten(2)
    out: dict[str, torch.Tensor] = {}
    vectors = x.reshape(-1, x.shape[-1])
    out["int8 scales"], out["int8 codes"] = reference.int8_encode(vectors)
    out["int8 back"] = reference.int8_decode(out["int8 codes"], out["int8 scales"], x.dtype)
    out["fp8 scales"], out["fp8 codes"] = reference.fp8_encode(x, case.group)
    out["fp8 back"] = reference.fp8_decode(out["fp8 codes"], case.group, out["fp8 scales"], x.dtype)
    if rows.shape[2] % 32 == 0:
        left = rows[:, case.first :]
        means = out["int4 means"] = reference.channel_means(left[: len(x) // 2])
        out["int4 steps"], out["int4 codes"] = reference.int4_encode(left, means)
        out["int4 back"] = reference.int4_decode(
            out["int4 codes"], means, out["int4 steps"], x.dtype
        )
    return {name: as_bytes(value) for name, value in out.items()}


def by_numba(case: Case) -> dict[str, Any]:
    x = bits(case.x)
    out, (planes, tokens, heads, dim) = {}, x.shape
    rows = x.reshape(planes, tokens, heads * dim)
    s = _arrays(case)
    assert quantize_cpu.int8_encode(x.reshape(-1, dim), s["int8 scales"], s["int8 codes"])
    back = np.empty_like(x)
    quantize_cpu.int8_decode(s["int8 codes"], s["int8 scales"], back.reshape(-1, dim))
    out["int8 back"] = back
    assert quantize_cpu.fp8_encode(x, case.group, s["fp8 scales"], s["fp8 codes"])
    back = np.empty_like(x)
    quantize_cpu.fp8_decode(s["fp8 codes"], case.group, s["fp8 scales"], back)
    out["fp8 back"] = back
    assert quantize_cpu.channel_means(rows, case.first, s["int4 means"])
    steps = s["int4 steps"].view(np.uint16)
    assert quantize_cpu.int4_encode(rows, case.first, s["int4 means"], steps, s["int4 codes"])
    back = rows.copy()
    quantize_cpu.int4_decode(s["int4 codes"], case.first, s["int4 means"], steps, back)
    out["int4 back"] = back[:, case.first :]
    return {name: np.ascontiguousarray(a).tobytes() for name, a in (s | out).items()}


def by_triton(case: Case, device: str, rows: int | None = None) -> dict[str, Any]:
    to, _ = BITS[case.x.dtype]
    x = case.x.contiguous().view(to).to(device)
    planes, tokens, heads, dim = x.shape
    s = {name: torch.from_numpy(a).to(device) for name, a in _arrays(case).items()}
    bad = torch.zeros(1, dtype=torch.int32, device=device)
    for encode in (True, False):
        target = {n: x if encode else x.clone().fill_(-1) for n in ("int8", "fp8", "int4")}
        how = {"kind": case.kind, "encode": encode, "rows": rows}
        launch_int8(target["int8"], s["int8 scales"], s["int8 codes"], bad, **how)
        launch_fp8(target["fp8"], s["fp8 scales"], s["fp8 codes"], bad, group=case.group, **how)
        launch_int4(
            target["int4"].view(planes, tokens, heads * dim), s["int4 means"], s["int4 steps"],
            s["int4 codes"], bad, first=case.first, **how,
        )  # fmt: skip
    assert not bad.item(), "bad"
    assert (target["int4"][:, : case.first] == -1).all()
    target["int4"] = target["int4"][:, case.first :]
    return {n: as_bytes(t) for n, t in s.items()} | {
        f"{n} back": as_bytes(t) for n, t in target.items()
    }


def _arrays(case: Case) -> dict[str, np.ndarray]:
    """Poisoned room for what encoders write."""
    planes, tokens, heads, dim = case.x.shape
    groups, left = -(-heads * dim // 32), tokens - case.first
    parts = {
        "int8 scales": (np.int16, (planes * tokens * heads,)),
        "int8 codes": (np.int8, (planes * tokens * heads, dim)),
        "fp8 scales": (np.float32, (planes, -(-tokens // case.group), heads)),
        "fp8 codes": (np.uint8, (planes, tokens, heads, dim)),
        "int4 means": (np.int16, (planes // 2, heads * dim)),
        "int4 steps": (np.int16, (planes, left, groups)),
        "int4 codes": (np.uint8, (planes, left, groups, 16)),
    }
    return {
        name: np.full(int(np.prod(shape)) * np.dtype(kind).itemsize, 0xA5, np.uint8)
        .view(kind).reshape(shape)
        for name, (kind, shape) in parts.items()
    }  # fmt: skip


def as_bytes(t: torch.Tensor) -> bytes:
    return t.cpu().contiguous().view(torch.uint8).numpy().tobytes()


__all__ = ["Case", "by_numba", "by_reference", "by_triton", "launch_hadamard", "turboquant_cpu"]
