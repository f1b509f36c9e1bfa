"""Which tokens of a prompt its last ones attend to most, over the rows that were loaded for them.

What a question attends to is what is worth computing for it: "ProphetKV",
arXiv 2602.02579; the maximum over heads is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch

from tierloom.adapters.vllm.repair.forward import Repair, Stretch, together
from tierloom.adapters.vllm.repair.rows import Rows

if TYPE_CHECKING:
    import numpy as np

QUERIES = 64
"""Of a long tail, its last tokens ask."""


def probe(
    repair: Repair, tail: Stretch, block_ids: Sequence[int], token_ids: Sequence[int]
) -> npt.NDArray[np.float32]:
    """Compute `tail`, a stretch of the prompt, and score each token before it: float32 [tail[0]].

    A score is a share of attention: of the tail's last `QUERIES` tokens, the mean over layers of
    the maximum over heads, each head's shares adding up to 1. All loaded rows must be in place in
    every layer. All ranks call it in step and get the same scores. Waits for the device.

    Raises what `Repair.forward` does. No hook is left behind whatever is raised.
    """
    first, end = tail
    repair.batch([tail], block_ids, token_ids)  # refused on all ranks, before a hook is set
    layers = list(repair.model.layers.values())
    queries: dict[int, torch.Tensor] = {}
    with together(lambda: Rows(repair.group, end, 1)) as rows:
        hooks = []
        try:
            for i, layer in enumerate(layers):
                note = partial(_note, queries, i, layer)
                hooks.append(layer.register_forward_pre_hook(note, with_kwargs=True))
            repair.forward([tail], block_ids, token_ids, skip_compiled=True)
        finally:
            for hook in hooks:
                hook.remove()
        slots = repair.slots(block_ids)[:end]
        scores = together(lambda: torch.stack([
            _shares(layer, queries[i], rows.read(slots, range(i, i + 1))[0, 0], first)
            for i, layer in enumerate(layers)
        ]))  # fmt: skip
    _maximum_over_ranks(scores)
    out: npt.NDArray[np.float32] = scores.mean(0).numpy()
    return out


def _note(
    queries: dict[int, torch.Tensor], i: int, layer: Any, _: Any, args: Any, named: Any
) -> None:
    """Before a layer's attention: its last queries, turned as they are used."""
    query = args[0] if args else named["query"]
    last = query.view(-1, layer.num_heads, layer.head_size)[-QUERIES:]
    queries[i] = last.detach().float().cpu().clone()


def _shares(layer: Any, q: torch.Tensor, k: torch.Tensor, context: int) -> torch.Tensor:
    """Of `q` [queries, heads, channels], the last of the rows `k` [tokens, KV heads, channels]:
    each context token's share of attention, the maximum over heads; float32 [context]."""
    at = torch.arange(len(k) - len(q), len(k))[:, None]
    place = torch.arange(len(k))[None]
    hidden = place > at
    if layer.sliding_window is not None:
        hidden |= place <= at - layer.sliding_window
    cap = getattr(layer.impl, "logits_soft_cap", None) or 0.0
    best = torch.zeros(context)
    each = layer.num_heads // layer.num_kv_heads
    for head in range(layer.num_kv_heads):  # one at a time: all of them would take gigabytes
        asked = q[:, head * each : (head + 1) * each].transpose(0, 1)
        logits = asked @ k[:, head].float().T * layer.impl.scale
        if cap:
            logits = cap * (logits / cap).tanh()
        seen = logits.masked_fill(hidden, -torch.inf).softmax(-1)[..., :context].sum(1)
        # a head that looks at nothing but the tail says nothing of the context
        shares = (seen / seen.sum(-1, keepdim=True)).nan_to_num(0.0)
        best = torch.maximum(best, shares.amax(0))
    return best


def _maximum_over_ranks(scores: torch.Tensor) -> None:
    """In place: ranks have other heads."""
    from vllm.distributed.parallel_state import get_tp_group

    if (group := get_tp_group()).world_size > 1:
        torch.distributed.all_reduce(scores, torch.distributed.ReduceOp.MAX, group=group.cpu_group)
