"""LMCache's own rules, re-implemented from its code (0.5.6). **The product itself was not run.**

Rows made here are named `LMCache's ...` and marked so. Where a container's length depends on its
coder, the ideal code length under the coder's own 16-bit table is counted, rounded up to bytes per
stream with the two bits that end it; the pickle around it, which costs more, is not counted.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from quality.chunks import Chunked, Made, uniform

STREAM = 256
"""Tokens of one coded stream at most."""

BINS = {
    1: (((10, 16), (20, 16), (10**9, 12)), ((2, 16), (10**9, 12))),
    2: (((10, 32), (10**9, 16)), ((2, 32), (10**9, 16))),
    3: (((10**9, 32),), ((10**9, 32),)),
}
"""CacheGen levels: (up to this layer, bins) of K, then of V. Level 2 is what LMCache ships for
models of its size class and the default for all others."""


def peers(chunk: int = 256) -> list[Chunked]:
    return [
        *(
            Chunked(f"LMCache's cachegen L{n}", lambda x, n=n: cachegen(x, n), chunk)
            for n in (3, 2, 1)
        ),
        Chunked("LMCache's fp8", fp8_cast, chunk),
        Chunked("LMCache's turboquant 4bit_nc", lambda x: turboquant(x, 4), chunk),
        Chunked("LMCache's turboquant 3bit_nc", lambda x: turboquant(x, 3), chunk),
    ]


def cachegen(kv: torch.Tensor, level: int) -> Made:
    """One scale per layer and token over all heads; per (layer, channel) a table of this chunk.

    The table has as many entries as the largest bin count of K (or V) plus one, 16 bits each. A
    channel is coded in streams of at most 256 tokens, each with 32 bits of length; a scale has the
    KV's own 16 bits.
    """
    back, nbytes = [], 0.0
    for plane, cuts in zip(kv, BINS[level], strict=True):
        layers, tokens = plane.shape[:2]
        bins = torch.tensor([_bins(cuts, i) for i in range(layers)])
        x = plane.flatten(2)
        half = (bins // 2 - 1).float().view(-1, 1, 1)
        scale = x.abs().amax(-1, keepdim=True).bfloat16().float().clamp_min(1e-9)
        symbols = (x * (half / scale) + half).round().clamp_min(0).minimum(2 * half)
        back.append(((symbols - half) / half * scale).view_as(plane))
        table = int(bins.max())
        nbytes += _coded(symbols.long(), table) + layers * x.shape[2] * 2 * (table + 1)
        nbytes += layers * tokens * 2
    return Made(torch.stack(back), nbytes)


def _bins(cuts: tuple[tuple[int, int], ...], layer: int) -> int:
    return next(bins for upto, bins in cuts if layer < upto)


def _coded(symbols: torch.Tensor, bins: int) -> float:
    """Bytes of `[layers, tokens, channels]` as streams, with the lengths of these."""
    edges = F.pad(_counts(symbols, bins).cumsum(1), (1, 0))
    edges = ((0xFFFF - bins) * edges / symbols.shape[1]).floor() + torch.arange(bins + 1)
    edges[:, -1] = 0x10000
    cost = -(edges.diff(dim=1) / 0x10000).log2()
    nbytes = 0.0
    for part in symbols.split(STREAM, dim=1):
        bits = (_counts(part, bins) * cost).sum(1) + 2
        nbytes += float((bits / 8).ceil().sum()) + 4 * len(bits)
    return nbytes


def _counts(symbols: torch.Tensor, bins: int) -> torch.Tensor:
    """How often each symbol comes, float32 `[layers * channels, bins]`."""
    layers, _, channels = symbols.shape
    at = torch.arange(layers * channels).view(layers, 1, channels) * bins
    counts = torch.bincount((at + symbols).flatten(), minlength=layers * channels * bins)
    return counts.view(-1, bins).float()


def fp8_cast(kv: torch.Tensor) -> Made:
    """e4m3 without a scale: what lies beyond 448 saturates."""
    return Made(kv.clamp(-448, 448).to(torch.float8_e4m3fn).float(), kv.numel())


def turboquant(kv: torch.Tensor, bits: int, raw: int = 2) -> Made:
    """K: sign flips, Walsh-Hadamard per head, Lloyd-Max, fp16 norm, direction renormalised ("nc").

    V: plain min/max per head and token. The first and last two layers stay as they are.
    """
    dim = kv.shape[-1]
    back, inner = kv.clone(), slice(raw, kv.shape[1] - raw)
    book = _lloyd_max(bits, 1 / math.sqrt(dim))
    for layer in range(inner.start, inner.stop):
        turn = _signs(dim, layer).unsqueeze(1) * _hadamard(dim)
        x = kv[0, layer]
        norm = x.norm(dim=-1, keepdim=True)
        codes = torch.bucketize((x / norm.clamp_min(1e-9)) @ turn, (book[1:] + book[:-1]) / 2)
        found = F.normalize(book[codes], dim=-1)
        back[0, layer] = found @ turn.T * norm.half().float()
    back[1, inner], of_v = uniform(kv[1, inner], bits, -1, dim)
    untouched = (kv.numel() - 2 * kv[0, inner].numel()) * 2
    of_k = kv[0, inner].numel() * (bits / 8 + 2 / dim)
    return Made(back, of_k + of_v + untouched)


def _signs(dim: int, layer: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(42 + 1337 * layer)
    return torch.randint(0, 2, (dim,), generator=random).float() * 2 - 1


def _hadamard(dim: int) -> torch.Tensor:
    """Orthonormal; `dim` a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < dim:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / math.sqrt(dim)


def _lloyd_max(bits: int, sigma: float) -> torch.Tensor:
    """The codebook of least squared error for N(0, sigma^2)."""
    book = torch.linspace(-3 * sigma, 3 * sigma, 2**bits)
    x = torch.linspace(-5 * sigma, 5 * sigma, 20001)
    weight = torch.exp(-((x / sigma) ** 2) / 2)
    for _ in range(200):
        cell = torch.bucketize(x, (book[1:] + book[:-1]) / 2)
        total = torch.zeros_like(book).scatter_add(0, cell, weight)
        moment = torch.zeros_like(book).scatter_add(0, cell, x * weight)
        book = moment / total.clamp_min(1e-12)
    return book
