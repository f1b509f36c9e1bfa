"""Selective recompute: some tokens of a prompt are computed over KV that the others were given.

No model is known by name. A cache layer writes what the model computes to the rows that it belongs
to and gives back all rows; a 4-D mask shows each token those before it. Whether a model takes that
is proved on its own weights, before it is used.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from inspect import signature
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tierloom.adapters.transformers import kernels
from tierloom.adapters.transformers.attention import Reached, attending, by_stretches, paying
from tierloom.adapters.transformers.model import with_cache
from tierloom.adapters.transformers.shape import KVShape
from tierloom.stages.errors import InputError, LayoutError
from tierloom.stages.kv.rope import Rotation
from tierloom.triton_kernels.blend.reference import turn_pairs

Planes = list[torch.Tensor]
"""K or V of each layer, `[1, heads, tokens, dim]`."""

PROVED = 64
"""Tokens of the second proof."""
FAR = 1021
"""The far position of the first proof, where the model reads that far."""


class RowLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """K and V of a whole context: fresh rows go to `rows`, or behind the last where that is None.
    The caller's tensors are written in place."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: torch.Tensor = keys
        self.values: torch.Tensor = values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.rows = rows
        self.seen: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        """Called with fresh K and V before they are written."""
        self.last = False
        """Nothing that the model computes once these rows are written is wanted."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rows is None:
            return super().update(key_states, value_states)
        if self.seen is not None:
            self.seen(key_states, value_states)
        self.keys.index_copy_(2, self.rows, key_states)
        self.values.index_copy_(2, self.rows, value_states)
        if self.last:
            raise Reached
        return self.keys, self.values


class Selective:
    """Selective recompute in one model. One thread at a time."""

    def __init__(self, model: Any, shape: KVShape, rotation: Rotation) -> None:
        """Proves that the model's K turns by `rotation`, and that rows computed over others come
        out the same. Raises LayoutError with the reason where one of them fails."""
        self.model, self.shape, self.rotation = model, shape, rotation
        self.kind = getattr(model.config, "model_type", "") or type(model).__name__
        self._base = model.base_model
        self._lock = threading.Lock()
        attention = model.config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise LayoutError(
                f"{self.kind} attends by {attention}, which takes no mask by position: "
                "load the model with attn_implementation='sdpa' to blend"
            )
        if not rotation.freqs.size or len(rotation.kind) != shape.layers:
            raise LayoutError(f"how {self.kind} turns its K is not known: it cannot be blended")
        try:
            self._prove_rotation()
            self._prove_rows()
        except (LayoutError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as e:  # whatever a model does with a cache that it does not expect
            raise LayoutError(
                f"{self.kind} fails where it computes chosen tokens: {type(e).__name__}: "
                f"{str(e)[:200]}"
            ) from e

    def turned(self, keys: Planes, shift: torch.Tensor | int) -> Planes:
        """K of each layer at another place: `shift` positions on, [tokens] or one for all. New
        tensors; a layer without rotary embedding is the one given."""
        return [k if self.rotation.kind[i] < 0 else self._turn(k, i, shift)
                for i, k in enumerate(keys)]  # fmt: skip

    @torch.no_grad()
    def recompute(
        self, ids: torch.Tensor, mask: npt.NDArray[np.bool_], keys: Planes, values: Planes
    ) -> DynamicCache:
        """Compute the tokens of `ids` [tokens] where `mask` [tokens] is set, over the rest.

        `keys` (at the places where they are now) and `values` are written in place, and become the
        cache that is given back, which holds the context. What a row that is computed held before,
        is not read by any token before it; NaN there does no harm once it is written. Raises
        InputError.
        """
        self._check(ids, keys, values)
        if mask.shape != (len(ids),):
            raise InputError(f"mask {mask.shape} for {len(ids)} tokens: it is one bool a token")
        rows = torch.from_numpy(np.flatnonzero(mask)).to(ids.device)
        cache: DynamicCache = _over(keys, values, rows)
        layers: Any = cache.layers
        layers[-1].last = True
        if len(rows):
            with self._lock, suppress(Reached):
                self._run(ids, rows, cache)
        for layer in layers:
            layer.rows, layer.last = None, False
        return cache

    @torch.no_grad()
    def deviations(
        self, ids: torch.Tensor, keys: Planes, values: Planes, layer: int, of: str, first: int = 0
    ) -> npt.NDArray[np.float64]:
        """[tokens] how far fresh K (`of` k), V (v) or both lie from what is given at `layer`:
        squared, summed over heads and channels; of both, each over its mean.

        All tokens from `first` on run through the layers before `layer`, whose rows are written in
        place; 0 for those before. Raises InputError.
        """
        self._check(ids, keys, values)
        if not 0 <= layer < self.shape.layers:
            raise InputError(f"check layer {layer} of {self.shape.layers}")
        found = np.zeros(len(ids))
        rows = torch.arange(first, len(ids), device=ids.device)

        def seen(fresh_k: torch.Tensor, fresh_v: torch.Tensor) -> None:
            kept = keys[layer][:, :, first:], values[layer][:, :, first:]
            dk, dv = kernels.deviations((fresh_k, fresh_v), kept).double()
            both = dk / dk.mean().clamp(min=1e-30) + dv / dv.mean().clamp(min=1e-30)
            found[first:] = {"k": dk, "v": dv, "both": both}[of].cpu().numpy()
            raise Reached

        cache = _over(keys, values, rows)
        cache.layers[layer].seen = seen
        with self._lock:
            try:
                self._run(ids, rows, cache)
            except Reached:
                return found
        raise InputError(f"layer {layer} of {self.kind} was not reached")

    @torch.no_grad()
    def scores(
        self, asked: torch.Tensor, keys: Planes, values: Planes, *, room: bool = False
    ) -> npt.NDArray[np.float64]:
        """[tokens] the share of the attention on the context that the tokens `asked`, which follow
        it, pay to each of its tokens: maximum over heads, mean over layers.

        Nothing given is written; but with `room` K and V end with rows for `asked`, and these are.
        Raises LayoutError for a model that does not show its queries.
        """
        n, layers = keys[0].shape[2] - (len(asked) if room else 0), self.shape.layers
        total, seen = torch.zeros(n, dtype=torch.float64), set[int]()
        at = torch.arange(n, n + len(asked), device=asked.device)
        by = paying(at, n, layers, total, seen)
        with self._lock, suppress(Reached), attending(self.model, by):
            self._forward(asked, at, n + len(asked), _over(keys, values, at if room else None))
        if len(seen) != layers:
            raise LayoutError(f"{self.kind} shows the queries of {len(seen)} layers only")
        return (total / layers).numpy()

    def _run(self, ids: torch.Tensor, rows: torch.Tensor, cache: Any) -> None:
        functional = self.model.config._attn_implementation == "sdpa"
        by = attending(self.model, by_stretches(rows)) if functional else nullcontext()
        with by:
            self._forward(ids[rows], rows, len(ids), cache)

    def _forward(self, ids: torch.Tensor, at: torch.Tensor, total: int, cache: Any) -> None:
        """Tokens `ids` at positions `at`, each attending to all rows up to its own."""
        dtype = self.shape.dtype
        later = torch.arange(total, device=at.device)[None] > at[:, None]
        mask = torch.zeros(later.shape, dtype=dtype, device=at.device)
        mask.masked_fill_(later, torch.finfo(dtype).min)
        more = {"cache_position": at, "position_ids": at[None]}
        names = signature(type(self._base).forward).parameters
        if "position_ids" not in names:
            raise LayoutError(f"{self.kind} takes no positions: it cannot be blended")
        self._base(
            input_ids=ids[None], attention_mask=mask[None, None], use_cache=True,
            **{k: v for k, v in more.items() if k in names}, **with_cache(self._base, cache),
        )  # fmt: skip

    def _turn(self, k: torch.Tensor, layer: int, shift: torch.Tensor | int) -> torch.Tensor:
        freqs = torch.from_numpy(self.rotation.freqs[self.rotation.kind[layer]]).to(k.device)
        angle = torch.as_tensor(shift, device=k.device).double().reshape(-1, 1) * freqs
        made = k.clone()
        cos, sin = angle.cos().float(), angle.sin().float()
        turn_pairs(made, cos, sin, self.rotation.first, interleaved=self.rotation.interleaved)
        return made

    def _check(self, ids: torch.Tensor, keys: Planes, values: Planes) -> None:
        s = self.shape
        want = (1, s.heads, len(ids), s.dim)
        if [t.shape for t in (*keys, *values)] != [want] * (2 * s.layers):
            raise InputError(f"K and V must be {s.layers} x {want}, one of each for every layer")

    def _noise(self) -> float:
        return 1e-3 if self.shape.dtype in (torch.float32, torch.float64) else 3e-2

    @torch.no_grad()
    def _prove_rotation(self) -> None:
        """A single token attends to itself only, so its hidden states do not depend on its place:
        K must differ by the rotation, V not at all, in every layer."""
        most = int(getattr(self.model.config, "max_position_embeddings", None) or FAR + 1)
        token = torch.full((1,), 5, device=self.shape.device)
        base_k, base_v = self._alone(token, 0)
        for at in (1, min(FAR, most - 1)):
            k, v = self._alone(token, at)
            self._alike(self.turned(base_k, at), k, f"K of a token at {at} is not that at 0 turned")
            self._alike(base_v, v, f"V of a token at {at} is not that at 0")

    def _alone(self, token: torch.Tensor, at: int) -> tuple[Planes, Planes]:
        cache: Any = DynamicCache(config=self.model.config)
        place = torch.tensor([at], device=token.device)
        names = signature(type(self._base).forward).parameters
        more = {"position_ids": place[None]} if "position_ids" in names else {}
        self._base(input_ids=token[None], use_cache=True, **more, **with_cache(self._base, cache))
        return [x.keys for x in cache.layers], [x.values for x in cache.layers]

    @torch.no_grad()
    def _prove_rows(self) -> None:
        """Poisoned rows computed in one stretch are those of a plain forward; a random third of
        them, poisoned again and computed over the others, comes out the same."""
        s, device = self.shape, self.shape.device
        words = int(getattr(self.model.config, "vocab_size", None) or PROVED)
        ids = (torch.arange(PROVED, device=device) * 7 + 5) % words
        plain: Any = DynamicCache(config=self.model.config)
        self._base(input_ids=ids[None], use_cache=True, **with_cache(self._base, plain))
        chance = np.random.default_rng(0)
        size = (1, s.heads, PROVED, s.dim)
        keys, values = (
            [torch.full(size, 1e4, dtype=s.dtype, device=device) for _ in range(s.layers)]
            for _ in range(2)
        )
        some = np.zeros(PROVED, np.bool_)
        some[chance.permutation(PROVED)[: PROVED // 3]] = True
        for mask in (np.ones(PROVED, np.bool_), some):
            for plane in (*keys, *values):
                plane[:, :, torch.from_numpy(np.flatnonzero(mask))] = 1e4
            self.recompute(ids, mask, keys, values)
            what = f"{mask.sum()} of {PROVED} rows computed over the others differ"
            self._alike([x.keys for x in plain.layers], keys, f"K: {what}")
            self._alike([x.values for x in plain.layers], values, f"V: {what}")

    def _alike(self, want: Planes, got: Planes, what: str) -> None:
        for i, (a, b) in enumerate(zip(want, got, strict=True)):
            off = float((a - b).float().norm() / a.float().norm().clamp(min=1e-20))
            if not off <= self._noise():
                raise LayoutError(
                    f"{what} (layer {i}, off by {off:.1g} of its size): "
                    f"{self.kind} cannot be blended"
                )


def _over(keys: Planes, values: Planes, rows: torch.Tensor | None = None) -> Any:
    cache = DynamicCache()
    cache.layers = [RowLayer(k, v, rows) for k, v in zip(keys, values, strict=True)]
    return cache
