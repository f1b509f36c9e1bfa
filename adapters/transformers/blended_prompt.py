"""A prompt's KV made of passages that were captured elsewhere, and of tokens computed over them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from tierloom.adapters.transformers.selective import Selective
from tierloom.stages.errors import InputError

if TYPE_CHECKING:
    from tierloom.adapters.transformers.cache import KeptLayer

TAIL = 256
"""Most tokens behind the last passage that are run once more to ask what they attend to."""


class BlendedPrompt(NamedTuple):
    """What is in place of a prompt before its last part is computed."""

    tokens: int
    """In place in every layer, from the first on."""
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
        return BlendedPrompt(receipt.tokens, receipt.tokens, 0, ticket)
    asked = len(prompt) - 1
    mask = _mask(ticket.compute(), asked)
    context = asked - int(mask[::-1].argmin())  # what follows the last passage is computed later
    keys, values = (
        [plane[:context].transpose(0, 1).unsqueeze(0) for plane in planes]
        for planes in ([r.rows_k for r in rows], [r.rows_v for r in rows])
    )
    ids = torch.from_numpy(prompt).to(keys[0].device)
    if ticket.needs == "scores" and len(prompt) - context <= TAIL:
        empty = torch.from_numpy(np.flatnonzero(_mask(ticket.missing(), asked)[:context]))
        for plane in (*keys, *values):  # memory as it came, perhaps NaN: the probe reads all rows
            plane[:, :, empty.to(ids.device)] = 0
        mask = _mask(ticket.compute(selective.scores(ids[context:], keys, values)), asked)
    selective.recompute(ids[:context], mask[:context], keys, values)
    return BlendedPrompt(context, receipt.tokens, int(mask[:context].sum()), ticket)


def _mask(stretches: list[tuple[int, int]], tokens: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    mask = np.zeros(tokens, np.bool_)
    for first, end in stretches:
        mask[first:end] = True
    return mask
