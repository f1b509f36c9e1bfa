"""Baselines of the literature, re-implemented from their papers. No header or padding is counted.

KIVI: Liu et al., ICML 2024, arXiv 2402.02750. Its window of recent tokens in 16 bits is left out
here: a stored chunk is never the newest part of a prompt that is being read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from quality.chunks import Chunked, Made, uniform

if TYPE_CHECKING:
    from collections.abc import Iterable

GROUP = 32


def baselines(chunk: int = 256) -> list[Chunked]:
    return [
        Chunked("int8 per token", int8_token, chunk),
        Chunked("int4 per token and head", int4_token_head, chunk),
        Chunked("KIVI-4", lambda x: kivi(x, 4), chunk),
        Chunked("KIVI-2", lambda x: kivi(x, 2), chunk),
    ]


def kivi(kv: torch.Tensor, bits: int) -> Made:
    """K: groups of 32 tokens of a channel. V: groups of 32 channels of a token."""
    keys = uniform(kv[0], bits, 1, GROUP)
    values = uniform(kv[1].flatten(2), bits, -1, GROUP)
    return _both(keys, (values[0].view_as(kv[1]), values[1]))


def int4_token_head(kv: torch.Tensor) -> Made:
    """Minimum and step per token and head."""
    return Made(*uniform(kv, 4, -1, kv.shape[-1]))


def int8_token(kv: torch.Tensor) -> Made:
    """Symmetric, one fp16 scale per layer and token over all heads."""
    scale = (kv.abs().amax((-2, -1), keepdim=True) / 127).half().float().clamp_min(2.0**-24)
    codes = (kv / scale).round().clamp(-127, 127)
    return Made(codes * scale, kv.numel() + 2 * scale.numel())


def _both(*planes: Iterable[object]) -> Made:
    (k, of_k), (v, of_v) = planes
    return Made(torch.stack([k, v]), of_k + of_v)
