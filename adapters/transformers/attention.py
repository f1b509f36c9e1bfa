"""Attention of a blend: a model attends by a function of ours for as long as a forward takes.

Models that ask transformers' registry for their attention do so; others go on with the mask that
they are given, which says the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tierloom.adapters.transformers import kernels

Attend = Callable[..., tuple[torch.Tensor, None]]
"""As the registry has it: of a module, queries, K, V `[1, heads, tokens, dim]`, a mask to add."""

NAME = "tierloom_blend"
ROWS = 32
"""Queries that attend at once, to keys up to the last one's: more of them waste keys, fewer of
them time."""

_now: ContextVar[Attend] = ContextVar("attend")


class Reached(Exception):
    """The model has come as far as it was to."""


@contextmanager
def attending(model: Any, by: Attend) -> Iterator[None]:
    """In this thread `model` attends `by` this meanwhile. One thread at a time for a model."""
    before = model.config._attn_implementation
    token = _now.set(by)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _now.reset(token)


def _registered(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return _now.get()(*args, **kwargs)


AttentionInterface.register(NAME, _registered)


def by_stretches(at: torch.Tensor) -> Attend:
    """Attention of queries at positions `at` [queries], rising, to the rows up to their own."""
    places = at.tolist()
    ends = [(first, min(first + ROWS, len(at))) for first in range(0, len(at), ROWS)]
    parts = [(first, end, places[end - 1] + 1) for first, end in ends]

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None, scaling: float | None = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        if attention_mask is None or kwargs.get("position_bias") is not None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, **kwargs
            )
        if kernels.on_gpu(query):
            scale = scaling or query.shape[-1] ** -0.5
            return kernels.attended(query, (key, value), at, scale), None
        grouped, keys, values = _grouped(query, key, value)
        out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        for first, end, seen in parts:
            part = scaled_dot_product_attention(
                grouped[:, :, first:end], keys[:, :, :seen], values[:, :, :seen],
                attn_mask=attention_mask[0, 0, first:end, :seen], scale=scaling,
            )  # fmt: skip
            out[0, first:end] = part.flatten(0, 1).transpose(0, 1)
        return out, None

    return attend


def paying(
    at: torch.Tensor, context: int, layers: int, total: torch.Tensor, seen: set[int]
) -> Attend:
    """The same, which adds to `total` [context] what the queries pay to each of the first `context`
    tokens, maximum over heads. It notes layers in `seen`, and ends at the last of `layers`."""

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None, scaling: float | None = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        seen.add(int(module.layer_idx))
        scale, kept = scaling or query.shape[-1] ** -0.5, (key, value)
        grouped, keys, values = _grouped(query, key, value)
        paid = kernels.paid(query, kept, at, context, scale) if kernels.on_gpu(query) else None
        if paid is None:
            logits = (grouped.flatten(1, 2) * scale @ keys[:, 0].transpose(1, 2)).float()
            logits = logits.view(*grouped.shape[:3], -1)
            if attention_mask is not None:
                logits += attention_mask[0, 0]
            share = logits.softmax(-1)
            sums = share[..., :context].sum(2).flatten(0, 1)
            paid = (sums / sums.sum(-1, keepdim=True)).amax(0)
        total.add_(paid.double().cpu())
        if len(seen) == layers:
            raise Reached
        if kernels.on_gpu(query):
            return kernels.attended(query, kept, at, scale), None
        out = share.flatten(1, 2).to(value.dtype) @ values[:, 0]
        return out.view(1, query.shape[1], -1, value.shape[3]).transpose(1, 2).contiguous(), None

    return attend


def _grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[heads of K, queries of each, tokens, dim]`, nothing of which is copied."""
    grouped = query[0].unflatten(0, (key.shape[1], -1))
    keys, values = (x[0, :, None].expand(-1, grouped.shape[1], -1, -1) for x in (key, value))
    return grouped, keys, values
