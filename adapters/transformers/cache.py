"""A cache for one request: stored KV is loaded ahead of the model, new KV is stored after it.

Memory is token-major, `[capacity, heads, dim]` for K and for V of each layer, because then a
token's row is one run of bytes: what is loaded is written straight into the place that attention
reads, and what the model computes is copied there once. The model sees the usual
`[1, heads, tokens, dim]`, as views.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from tierloom.adapters.transformers.shape import KVShape
from tierloom.stages.errors import InputError, LayoutError, TierloomError
from tierloom.stages.kv.layout import KVLayout

if TYPE_CHECKING:
    from tierloom.adapters.transformers.blended_prompt import BlendedPrompt
    from tierloom.adapters.transformers.selective import Selective

SPARE = 64
"""Token slots added when a request outgrows its memory by one."""


class Abandoned(TierloomError):
    """Kept KV that was planned for did not all arrive; what the model computed on it is void.

    Nothing wrong was used. Run the request again with a cache made with `retrieve=False`.
    """


class KeptLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """K and V of one layer. The cache owns the memory; attention reads views of it."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: TierloomCache, index: int, shape: KVShape, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache, self.index = cache, index
        self.dtype, self.device = shape.dtype, shape.device
        size = (capacity, shape.heads, shape.dim)
        self.rows_k = torch.empty(size, dtype=shape.dtype, device=shape.device)
        self.rows_v = torch.empty(size, dtype=shape.dtype, device=shape.device)
        self.length = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do: the shape was known beforehand."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[1, heads, new, dim]`; returns views `[1, heads, length, dim]` of all of it.

        The first call waits until what was planned for this layer is in place. Raises Abandoned.
        """
        if key_states.shape[0] != 1:
            raise InputError(f"batch of {key_states.shape[0]}: this cache holds one sequence")
        self.cache.arrive(self.index)
        end = self.length + key_states.shape[2]
        self.cache.expect(self.length, end)
        if end > self.rows_k.shape[0]:
            self._grow(end)
        self.rows_k[self.length : end] = key_states[0].transpose(0, 1)
        self.rows_v[self.length : end] = value_states[0].transpose(0, 1)
        self._set_length(end)
        self.cache.leave(self.index, end)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; a negative number, as transformers has it."""
        if tokens_to_remove > 0:
            raise InputError(f"crop({tokens_to_remove}): pass minus the tokens to remove")
        self._set_length(max(0, self.length + tokens_to_remove))

    def reset(self) -> None:
        self._set_length(0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise InputError("beam search needs several sequences; this cache holds one")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise InputError("this cache holds one sequence and cannot be repeated")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise InputError("this cache holds one sequence: there is nothing to select")

    def _set_length(self, length: int) -> None:
        self.length = length
        self.keys = self.rows_k[:length].transpose(0, 1).unsqueeze(0)
        self.values = self.rows_v[:length].transpose(0, 1).unsqueeze(0)

    def _grow(self, need: int) -> None:
        """A store under way goes on reading the old memory, which its ticket holds."""
        for name in ("rows_k", "rows_v"):
            old = getattr(self, name)
            new = old.new_empty((need + SPARE, *old.shape[1:]))
            new[: self.length] = old[: self.length]
            setattr(self, name, new)


class TierloomCache(Cache):
    """`past_key_values` for one sequence, loaded from and stored in a tierloom pipeline.

    Made by `CachedModel.cache`. Pass it to `model.generate` with the whole prompt and a full
    attention mask, or to `model(...)` with the tokens from `get_seq_length()` on. At least one
    token of the prompt is always left to compute.
    """

    def __init__(
        self, pipe: Any, shape: KVShape, prompt: npt.NDArray[np.int64], *,
        room: int = SPARE, retrieve: bool = True, store: bool = True, salt: str = "",
        changed: Callable[[], str] = lambda: "", stepwise: bool = False,
        blend: Selective | None = None,
    ) -> None:  # fmt: skip
        """`prompt`: the token ids. `room`: tokens to be generated. Waits for the plan only.

        `changed`: says what of the model has changed since its KV got its name, empty for nothing;
        asked when the prompt's KV is whole. `stepwise`: the prompt is run once, then token by
        token, and anything else is an error. `blend`: text captured elsewhere will do, too, and
        this computes what must be; then it waits for that.
        """
        self.pipe, self.prompt, self._salt = pipe, prompt, salt
        self._changed, self._stepwise = changed, stepwise
        self._rows = [KeptLayer(self, i, shape, len(prompt) + room) for i in range(shape.layers)]
        super().__init__(layers=list(self._rows))
        self.planned = 0
        """Tokens that were found and are being loaded; `get_seq_length()` starts there."""
        self.loading: Any = None
        """Ticket of the retrieve, None when nothing was found or asked for."""
        self.storing: Any = None
        """Ticket of the store of the prompt."""
        self.blended: BlendedPrompt | None = None
        """What was done for a blend."""
        self._waiting = [False] * shape.layers
        if retrieve and len(prompt) > 1:
            self._begin_retrieve() if blend is None else self._blend(blend)
        if store:
            self.storing = self._begin("begin_store", prompt, **self._exactness())

    def arrive(self, index: int) -> None:
        """Wait until what was planned for layer `index` is in place. Raises Abandoned."""
        if not self._waiting[index]:
            return
        self._waiting[index] = False
        there = self.loading.wait_layer(index)
        if there < self.planned:
            self.abandon()
            raise Abandoned(
                f"{there} of {self.planned} planned tokens came by layer {index}: "
                "compute the prompt without the cache"
            )

    def expect(self, length: int, end: int) -> None:
        """A layer that holds `length` tokens is about to hold `end`. Raises LayoutError."""
        most = max(len(self.prompt), length + 1)
        if self._stepwise and end > most:
            self.abandon()
            raise LayoutError(
                f"the model was run over {end - length} tokens, but {most - length} were left: it "
                "does not continue from what its cache holds, so its KV cannot be stored"
            )

    def leave(self, index: int, length: int) -> None:
        """Layer `index` holds `length` tokens; once that is the prompt, it may be stored.

        Raises Abandoned if by then the model is no longer the one whose stored KV it was given.
        """
        if index != self._whole or length < len(self.prompt):
            return
        self._whole += 1
        if self._whole == len(self.layers) and (what := self._changed()):
            self.abandon()
            if self.planned:
                raise Abandoned(f"{what} changed before the prompt was computed")
        elif self.storing is not None:
            self.storing.layer_done(index)

    def abandon(self) -> None:
        """Give up what is under way. Nothing touches this cache's memory once it has returned."""
        for ticket in (self.loading, self.storing):
            if ticket is not None:
                ticket.cancel()
        if self.loading is not None:
            self.loading.wait()  # then what is damaged has been dropped, and may be stored again

    def store_all(self, tokens: npt.NDArray[np.int64]) -> Any:
        """Store `tokens`, the whole sequence as far as it was computed; returns the ticket."""
        return self._begin("store", tokens[: self.get_seq_length()], **self._exactness())

    _whole = 0
    """Layers that hold the prompt, and were handed to the store, in model order."""

    def _begin_retrieve(self) -> None:
        self.loading = self._begin("begin_retrieve", self.prompt[:-1])
        self.planned = self.loading.planned()
        if not self.planned:
            self.loading = None
            return
        self._waiting = [True] * len(self.layers)
        for layer in self._rows:
            layer._set_length(self.planned)

    def _blend(self, selective: Selective) -> None:
        from tierloom.adapters.transformers.blended_prompt import blend_prompt

        self.loading = self._begin("retrieve", self.prompt[:-1], blend=True)
        try:
            self.blended = blend_prompt(selective, self.loading, self.prompt, self._rows)
        except BaseException:
            self.loading.cancel()
            raise
        self.planned = self.blended.ready
        for layer in self._rows:
            layer._set_length(self.planned)

    def _exactness(self) -> dict[str, int]:
        """How far what is stored was computed over nothing captured elsewhere, where that is not
        all of it."""
        done = self.blended
        return {"exact": done.exact} if done is not None and done.tokens > done.exact else {}

    def _begin(self, what: str, tokens: npt.NDArray[np.int64], **more: Any) -> Any:
        caches = [(layer.rows_k, layer.rows_v) for layer in self._rows]
        return getattr(self.pipe, what)(
            tokens, caches, np.arange(len(tokens), dtype=np.int64), layout=layout_of(caches),
            salt=self._salt, **more,
        )  # fmt: skip


def layout_of(caches: list[tuple[torch.Tensor, torch.Tensor]]) -> KVLayout:
    """Layout of token-major memory: a pool of slots without blocks."""
    return KVLayout.from_tensors(caches, order="SHD", block_tokens=1)
