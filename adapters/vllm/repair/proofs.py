"""What is tried on the engine's own weights before a repair is believed, in blocks nobody reads.

One token alone attends to itself only, so its hidden states do not depend on where it stands: K of
every layer must be turned by the difference of positions, and V the same. That proves RoPE, and
refuses ALiBi, learned positions and kinds that we turn otherwise. And rows computed at once must
come out the same when some are computed over the others, which proves the call itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tierloom.adapters.vllm.repair.forward import ModelInput, Repair, Stretch, cut, together
from tierloom.adapters.vllm.repair.rows import Rows
from tierloom.stages.kv.rope import Rotation
from tierloom.triton_kernels.blend.reference import turn_pairs

ROWS = 64
"""Tokens for which the caller gives blocks; their rows are garbage afterwards."""
_POISON = 777.0
"""No row of a model's is this in all of its channels."""
_EPS = {"float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""A rounding of a row in each dtype; float32 with some room for sums in another order."""
_ANGLE = 2.0**-22
"""A rounding of an angle, of each radian: tables are float32 products of position and frequency."""


def prove(repair: Repair, block_ids: Sequence[int], rotation: Rotation) -> str | None:
    """Why prompts of this engine must not be repaired; None: both proofs hold.

    `block_ids`: vLLM's blocks that the caller owns, of `ROWS` tokens at least. All ranks call it
    in step; each makes the same calls of the model whatever it sees, and judges at the end.
    Raises InputError where the blocks are too few, and what the model raises.
    """
    layers = range(len(repair.model.layers))
    with together(lambda: Rows(repair.group, ROWS, len(layers))) as rows:
        alone = _alone(repair, rows, block_ids)
        first, again = _twice(repair, rows, block_ids)
    return _turns(repair, alone, rotation) or _same(repair, first, again)


def turn(k: torch.Tensor, rotation: Rotation, places: int) -> torch.Tensor:
    """`k` [layers, tokens, heads, channels], moved on by so many positions; float64."""
    out = k.double().clone()
    for layer, kind in enumerate(rotation.kind.tolist()):
        if kind < 0:
            continue
        angle = torch.from_numpy(rotation.freqs[kind]) * places
        turn_pairs(
            out[layer], angle.cos(), angle.sin(), rotation.first, interleaved=rotation.interleaved
        )
    return out


def read_rotation(rotary: Sequence[Any]) -> Rotation:
    """How each layer's rotary module turns K, from its own table: whatever the scaling, a row is
    the cosines and sines of position times frequency, times a factor that angles do not show.

    Raises LookupError where layers differ in more than their frequencies.
    """
    kinds: dict[int, int] = {}
    freqs: list[np.ndarray[Any, np.dtype[np.float64]]] = []
    styles = {bool(m.is_neox_style) for m in rotary if m is not None}
    if len(styles) != 1:
        raise LookupError("some layers pair channels in one way, others in the other")
    for module in rotary:
        if module is not None and id(module) not in kinds:
            kinds[id(module)] = len(freqs)
            freqs.append(_frequencies(module))
    if len({len(f) for f in freqs}) > 1:
        raise LookupError("layers turn different numbers of channels")
    kind = [-1 if m is None else kinds[id(m)] for m in rotary]
    return Rotation(np.stack(freqs), np.array(kind, np.int32), 0, not styles.pop())


def _frequencies(module: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Radians per token, float64 [half]. Each row twice as far on makes them twice as exact."""
    table = module.cos_sin_cache
    if table.dtype != torch.float32:  # a table in 16 bits is the model's, its angles are not
        table = module._compute_cos_sin_cache()
    cos, sin = table.detach().cpu().double().numpy().reshape(len(table), 2, -1).swapaxes(0, 1)
    found: np.ndarray[Any, np.dtype[np.float64]] = np.arctan2(sin[1], cos[1])
    at = 2
    while at < min(len(table), 4096):
        seen = np.arctan2(sin[at], cos[at])
        found = (seen + 2 * np.pi * np.round((found * at - seen) / (2 * np.pi))) / at
        at *= 2
    return found


def _alone(repair: Repair, rows: Rows, block_ids: Sequence[int]) -> list[tuple[int, torch.Tensor]]:
    """(position, [K and V, layers, 1, heads, channels]) of one token by itself, at three places."""
    device, layers = repair.model.device, range(len(repair.model.layers))
    slot = repair.slots(block_ids)[:1]
    found = []
    for at in (0, 1, repair.longest - 1):
        rows.fill(slot, layers, _POISON)
        batch = ModelInput(
            torch.tensor([repair.vocabulary // 3], dtype=torch.int32, device=device),
            torch.tensor([at], dtype=torch.int64, device=device),
            torch.from_numpy(slot).to(device), [1], [1],
        )  # fmt: skip
        repair.compute(batch, block_ids)
        found.append((at, rows.read(slot, layers)))
    return found


def _twice(
    repair: Repair, rows: Rows, block_ids: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of all tokens computed at once, and when a third was computed anew over the others.

    The third is random: of a regular choice some mistakes are blind to it.
    """
    random, layers = np.random.default_rng(0), range(len(repair.model.layers))
    ids = random.integers(0, repair.vocabulary, ROWS)
    slots = repair.slots(block_ids)[:ROWS]
    rows.fill(slots, layers, _POISON)
    for part in cut([(0, ROWS)], repair.tokens, repair.sequences):
        repair.forward(part, block_ids, ids.tolist())
    first = rows.read(slots, layers)
    chosen = np.sort(random.choice(ROWS, ROWS // 3, replace=False))
    rows.fill(slots[chosen], layers, _POISON)
    for part in cut(_stretches(chosen.tolist()), repair.tokens, repair.sequences):
        repair.forward(part, block_ids, ids.tolist())
    return first, rows.read(slots, layers)


def _stretches(tokens: Sequence[int]) -> list[Stretch]:
    """Rising tokens as stretches."""
    out: list[Stretch] = []
    for token in tokens:
        if out and out[-1][1] == token:
            out[-1] = (out[-1][0], token + 1)
        else:
            out.append((token, token + 1))
    return out


def _turns(repair: Repair, alone: list[tuple[int, torch.Tensor]], rotation: Rotation) -> str | None:
    names, (_, start) = list(repair.model.layers), alone[0]
    for at, rows in alone:
        if why := _unwritten(names, rows):
            return f"of one token at position {at}, {why}"
        if len(rotation.kind) != len(names) or (2 * rotation.freqs.shape[1] > rows.shape[-1]):
            return "the rotation is not of these layers and heads"
        allowed = 4 * _EPS[repair.group.layout.dtype] + at * _ANGLE
        turned = torch.stack([turn(start[0], rotation, at), start[1].double()])
        off = _apart(turned, rows).flatten(2).amax(2)
        for part, what in enumerate(("K is not turned as we turn it", "V is not the same")):
            if not bool((off[part] <= allowed).all()):
                layer = int(off[part].argmax())
                return (
                    f"of one token at position {at}, {what}: {names[layer]} is off by "
                    f"{float(off[part][layer]):.2g} of its length, {allowed:.2g} is allowed"
                )
    return None


def _same(repair: Repair, first: torch.Tensor, again: torch.Tensor) -> str | None:
    names = list(repair.model.layers)
    for rows in (first, again):
        if why := _unwritten(names, rows):
            return f"of {ROWS} tokens, {why}"
    # a row is a sum of roundings of all layers before it, and other batches round otherwise
    allowed = 1e-3 if repair.group.layout.dtype == "float32" else 0.1
    off = _apart(first.double(), again)
    if not bool((off <= allowed).all()):
        part, layer, token = np.unravel_index(int(off.argmax()), off.shape[:3])
        return (
            f"of {ROWS} tokens, some computed over the others came out as other rows: "
            f"{'KV'[part]} of token {token} in {names[layer]} is off by {float(off.max()):.2g} of "
            f"its length, {allowed:.2g} is allowed"
        )
    return None


def _apart(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """[K and V, layers, tokens]: how far rows are from those wanted, in lengths of these."""
    a, b = wanted.flatten(3), found.double().flatten(3)
    off: torch.Tensor = (a - b).norm(dim=-1) / a.norm(dim=-1)
    return off


def _unwritten(names: Sequence[str], rows: torch.Tensor) -> str | None:
    """Which row was not written, is no number, or so small that anything would pass for it."""
    flat = rows.double().flatten(3)
    bad = ~flat.isfinite().all(-1) | (flat == _POISON).any(-1) | (flat.norm(dim=-1) < 1e-6)
    if not bool(bad.any()):
        return None
    part, layer, token = (int(i[0]) for i in bad.nonzero(as_tuple=True))
    return f"{'KV'[part]} of row {token} in {names[layer]} is poison, no number, or next to nothing"
