"""A prompt's KV made of passages that were captured elsewhere, and of tokens computed over them."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from tierloom.adapters.transformers.selective import Planes, Selective
from tierloom.stages.errors import InputError, LayoutError

if TYPE_CHECKING:
    from tierloom.adapters.transformers.cache import KeptLayer

log = logging.getLogger("tierloom.transformers")

TAIL = 256
"""Most tokens behind the last passage that are run once more to ask what they attend to."""


class BlendedPrompt(NamedTuple):
    """What is in place of a prompt before its last part is computed."""

    ready: int
    """In place in every layer, from the first on."""
    tokens: int
    """Of these, up to the end of the last passage."""
    exact: int
    """Of these, from the first on, computed over nothing captured elsewhere."""
    computed: int
    """Of these, computed now."""
    ticket: Any
    """The retrieve, which has ended."""


def blend_prompt(
    selective: Selective, ticket: Any, prompt: np.ndarray[Any, Any], rows: list[KeptLayer]
) -> BlendedPrompt:
    """Wait for a retrieve with `blend=True` of all of `prompt` but its last token into `rows`, and
    compute what it asks for. Raises InputError for a policy that has no place here."""
    receipt = ticket.wait()
    if ticket.needs == "deviations":
        raise InputError("policy deviation of blend is for comparison: use heads or probe here")
    if not receipt.blended:
        return BlendedPrompt(receipt.tokens, receipt.tokens, receipt.tokens, 0, ticket)
    began, asked = time.perf_counter(), len(prompt) - 1
    mask = _mask(ticket.compute(), asked)
    context = asked - int(mask[::-1].argmin())  # where the last passage ends
    ids = torch.from_numpy(prompt).to(rows[0].device)
    short = len(prompt) - context <= TAIL
    if ticket.needs == "scores" and short:
        keys, values = _planes(rows, len(prompt))
        empty = torch.from_numpy(np.flatnonzero(_mask(ticket.missing(), asked)[:context]))
        for plane in (*keys, *values):  # memory as it came, perhaps NaN: the probe reads all rows
            plane[:, :, empty.to(ids.device)] = 0
        try:
            scores = selective.scores(ids[context:], keys, values, room=True)
            mask = _mask(ticket.compute(scores), asked)
        except LayoutError as error:
            log.warning("only heads of passages are computed: %s", error)
    computed = int(mask[:context].sum())
    # The tail costs less beside other tokens than in a forward of its own, over which K and V are
    # repeated for each group of heads.
    ready = asked if short and computed else context
    selective.recompute(ids[:ready], mask[:ready], *_planes(rows, ready))
    ticket.repaired(time.perf_counter() - began)
    return BlendedPrompt(ready, context, receipt.tokens, computed, ticket)


def _planes(rows: list[KeptLayer], tokens: int) -> tuple[Planes, Planes]:
    """Views of the first `tokens` of each layer's K and V, `[1, heads, tokens, dim]`."""
    keys, values = (
        [plane[:tokens].transpose(0, 1).unsqueeze(0) for plane in planes]
        for planes in ([r.rows_k for r in rows], [r.rows_v for r in rows])
    )
    return keys, values


def _mask(stretches: list[tuple[int, int]], tokens: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    mask = np.zeros(tokens, np.bool_)
    for first, end in stretches:
        mask[first:end] = True
    return mask
