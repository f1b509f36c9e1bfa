"""transformers: `generate` with stored KV, for causal LMs of Hugging Face on CPU or GPU.

    kept = CachedModel(model, config="tiered")
    out = kept.generate(input_ids, max_new_tokens=64)    # retrieves before prefill, then stores
    kept.last.hit_tokens

Loading overlaps the forward pass layer by layer, and so does storing. After any failure on the
way, the prompt is computed as if there were no cache.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import tierloom
from tierloom.adapters.model_identity.shared import SharedIdentity, shared_rope
from tierloom.adapters.transformers.cache import (
    SPARE,
    Abandoned,
    KeptLayer,
    TierloomCache,
    layout_of,
)
from tierloom.adapters.transformers.generate_options import (
    check_options,
    prompt_of,
    room as room_of,
)
from tierloom.adapters.transformers.model import (
    fingerprint,
    generated_with,
    rope,
    shape_of,
    weight_files,
)
from tierloom.adapters.transformers.model_state import State, rest_id
from tierloom.adapters.transformers.shape import KVShape
from tierloom.adapters.transformers.streamer import Watch
from tierloom.pipeline.config.load import load_config
from tierloom.stages.contract.request import Receipt
from tierloom.stages.contract.stage import ModelFacts
from tierloom.stages.errors import InputError, LayoutError
from tierloom.stages.kv.rope import rotation

if TYPE_CHECKING:
    from tierloom.adapters.transformers.selective import Selective

log = logging.getLogger("tierloom.transformers")

__all__ = ["Abandoned", "CachedModel", "Generation", "KVShape", "KeptLayer", "TierloomCache"]

PACE = {"graphs.store.pace.by": "layer", "graphs.retrieve.pace.by": "layer"}
"""Both graphs follow the model layer by layer here, whatever the configuration says."""


@dataclass(slots=True)
class Generation:
    """The result of one `generate`, besides its output."""

    prompt_tokens: int
    hit_tokens: int = 0
    """Tokens of the prompt that were loaded, not computed."""
    blended_tokens: int = 0
    """Of these, captured after other text than they follow here."""
    computed_tokens: int = 0
    """Tokens of reused text, and between it, that were computed for a blend."""
    not_blended: str = ""
    """Why a blend was asked for and cannot be had of this model."""
    abandoned: str = ""
    """Why stored KV was planned for and then not used; empty if it was used."""
    ttft_s: float = 0.0
    """From the call to the first new token, lookup and load included."""
    seconds: float = 0.0
    """The whole call."""
    loaded: Receipt | None = None
    storing: tuple[Any, ...] = ()
    """Tickets of what is being stored; `wait()` on each gives its receipt."""


class CachedModel:
    """A causal LM whose KV outlives the request. One call at a time; owns its pipeline.

    Raises LayoutError for models whose KV cannot be stored and InputError for calls that cannot be
    served, each with the reason.
    """

    def __init__(
        self, model: Any, *, config: str = "tiered", name: str = "",
        weights: str | SharedIdentity = "", salt: str = "",
        overrides: Mapping[str, Any] | None = None, store_decode: bool = False,
    ) -> None:  # fmt: skip
        """Open `config` for `model`, which must be in eval mode.

        A change of the model is detected at the next call, and its KV is stored under another name
        from then on, in a new pipeline. Detected is whatever torch counts or replaces, and in each
        tensor a sample of values (torch does not count writes through `.data`).

        `name`: defaults to the config's. `weights`: a content id of all that the model computes
        with, instead of hashing it; then changes are refused. `salt`: the tenant's secret.
        `store_decode`: store the answer's KV too, so that the next turn of a chat hits all of this
        one.

        With `chunk.keys: sglang`, vLLM and SGLang name the model by its files: `weights` must be
        `shared_id(folder, dtype="float32")`, and `name` is then empty unless given.
        """
        self.model = getattr(model, "_orig_mod", model)  # of torch.compile, which wraps it
        self.store_decode, self._salt = store_decode, salt
        self.last = Generation(0)
        self._config, self._overrides = config, PACE | dict(overrides or {})
        self._shares = load_config(config, self._overrides).chunk.keys == "sglang"
        if self._shares and not weights:
            raise InputError(
                "chunk.keys is sglang, and a model in memory may differ from the files that other "
                "engines name it by: pass weights=shared_id(folder, dtype='float32'), with its "
                "dtype (tierloom.adapters.model_identity.shared), if they are the same"
            )
        self._name = name
        if not self._shares:
            self._name = self._name or getattr(model.config, "name_or_path", "")
            self._name = self._name or model.config.model_type or type(model).__name__
        self._rope: str | None = None
        """As the user gave it."""
        if isinstance(weights, SharedIdentity):
            weights, self._rope = weights
        self._weights = weights
        self._touched: set[str] = set()
        """Tensors that were changed while this was open: all of their bytes are hashed."""
        self._names: tuple[str, ...] = ()
        self._blends: tuple[tuple[str, ...], Selective | str] | None = None
        """Of a model with these names: what computes chosen tokens, or why nothing can."""
        self._watched()
        if not weights:
            rest_id(self.model)  # refuses before anything is run what could not be named
        self._open()

    def _watched(self) -> State:
        return State(self.model, vouched=bool(self._weights))

    def _open(self) -> None:
        """Open the pipeline for the model as it is, unless it is open for that."""
        self.shape = shape_of(self.model)
        state = self._watched()
        names = self._named()
        if names != self._names:
            if self._names:
                self.close()
            # Two rows: the layout's self-test, at opening, then holds for caches of any length.
            rows = torch.empty(2, self.shape.heads, self.shape.dim, dtype=self.shape.dtype)
            rows = rows.to(self.shape.device)
            self.pipe = tierloom.open(
                self._config, model=self._name, weights=names[0], rope=names[1], part=names[2],
                layout=layout_of([(rows, rows)] * self.shape.layers),
                facts=ModelFacts(self.shape.layers, weight_files(self.model)),
                overrides=self._overrides,
            )  # fmt: skip
        self._names, self._state = names, state

    def _named(self) -> tuple[str, ...]:
        """What identifies the KV besides the model's name: its weights, RoPE, how else it computes
        with them, and the shape of its KV."""
        how = "" if self._weights else rest_id(self.model)
        weights = self._weights or fingerprint(self.model, self._touched)
        turns = self._rope
        if turns is None:
            turns = shared_rope(self.model.config.to_dict()) if self._shares else rope(self.model)
        return weights, turns, how, str(self.shape)

    def _changed(self) -> str:
        """The part of the model that changed since the pipeline was opened; empty: none."""
        try:
            found = self._watched().differs(self._state)
        except InputError as e:
            return f"the model ({e})"
        return found[0] if found else ""

    def _follow(self) -> None:
        """Open a new pipeline if the model has changed. Raises InputError if the user gave an id
        of the weights."""
        found = self._watched().differs(self._state)
        if found is None:
            return
        if self._weights:
            raise InputError(
                f"{found[0]} of the model changed, and weights={self._weights!r} identifies it as "
                "it was: close this and open another with a new id"
            )
        self._touched |= set(found)
        self._open()

    def cache(
        self,
        input_ids: torch.Tensor,
        *,
        room: int = SPARE,
        retrieve: bool = True,
        store: bool = True,
    ) -> TierloomCache:
        """A cache for this prompt `[1, tokens]`, into which stored KV is being loaded.

        For those who call the model themselves, with `use_cache=True` and `cache=` or, before
        transformers 5.24, `past_key_values=`; they handle Abandoned, and call `storing.wait()` of
        it before they close this. Raises InputError.
        """
        if getattr(self.model.config, "use_cache", None) is False:
            raise InputError(
                "the model's config has use_cache=False, and then a forward may ignore a cache: "
                "set model.config.use_cache = True"
            )
        self._follow()
        return self._cache(input_ids, room=room, retrieve=retrieve, store=store)

    def _cache(self, input_ids: torch.Tensor, **how: Any) -> TierloomCache:
        return TierloomCache(
            self.pipe,
            self.shape,
            prompt_of(input_ids),
            salt=self._salt,
            changed=self._changed,
            **how,
        )

    def generate(
        self, input_ids: torch.Tensor, *, streamer: Any = None,
        attention_mask: torch.Tensor | None = None, blend: bool = False, **options: Any,
    ) -> Any:  # fmt: skip
        """`model.generate` for one prompt `[1, tokens]`, with its options and its result.

        `blend`: reuse text that was captured elsewhere in other prompts as well, approximately;
        wants a pipeline that finds it, such as `config="blend"`.
        `self.last` says what happened. Does not wait for what is being stored: see `flush`.
        """
        started = time.perf_counter()
        check_options(self.model, input_ids, attention_mask, options)
        self.last = Generation(input_ids.shape[1])
        watch = Watch(streamer)
        room = room_of(self.model, input_ids.shape[1], options)
        self._follow()
        selective = self._selective() if blend else None
        cache = self._cache(input_ids, room=room, stepwise=True, blend=selective)
        try:
            out = self._generate(cache, input_ids, watch, options)
        except Abandoned as e:
            self.last.abandoned = str(e)
            watch.skip_prompt()
            self._follow()
            cache = self._cache(input_ids, room=room, retrieve=False, stepwise=True)
            out = self._generate(cache, input_ids, watch, options)
        self.last.hit_tokens = cache.planned
        if cache.blended is not None:
            self.last.computed_tokens = cache.blended.computed
            self.last.hit_tokens = cache.blended.tokens - cache.blended.computed
            self.last.blended_tokens = cache.blended.tokens - cache.blended.exact
        self._close(cache, out)
        self.last.ttft_s = watch.first - started
        if not cache.planned:
            self.pipe.note_prefill(self.last.prompt_tokens, self.last.ttft_s)
        self.last.seconds = time.perf_counter() - started
        return out

    def _selective(self) -> Selective | None:
        """What computes chosen tokens in the model as it is; None: it cannot be blended, and
        `last.not_blended` says why."""
        from tierloom.adapters.transformers.selective import Selective

        if self._blends is None or self._blends[0] != self._names:
            found: Selective | str = "how it turns its K is not known"
            turns = rotation(self._names[1], self.shape.dim, self.shape.layers)
            if turns is not None:
                try:
                    found = Selective(self.model, self.shape, turns)
                except LayoutError as error:
                    found = str(error)
            if isinstance(found, str):
                log.warning("prompts of this model are not blended: %s", found)
            self._blends = self._names, found
        answer = self._blends[1]
        if isinstance(answer, str):
            self.last.not_blended = answer
            return None
        return answer

    def flush(self, timeout: float | None = None) -> None:
        """Wait until what the last call stores is stored, or canceled."""
        for ticket in self.last.storing:
            ticket.wait(timeout)

    def close(self) -> None:
        self.flush()
        self.pipe.close()

    def __enter__(self) -> CachedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _generate(
        self, cache: TierloomCache, ids: torch.Tensor, watch: Watch, options: dict[str, Any]
    ) -> Any:
        if (config := options.get("generation_config")) is None:
            options = {**options, "use_cache": True}
        else:
            options = {**options, "generation_config": (config := copy.copy(config))}
            config.use_cache, config.cache_implementation = True, None
        try:
            return self.model.generate(
                ids, attention_mask=torch.ones_like(ids), streamer=watch,
                **generated_with(self.model, cache), **options,
            )  # fmt: skip
        except BaseException:
            cache.abandon()
            raise

    def _close(self, cache: TierloomCache, out: Any) -> None:
        """Wait until nothing in flight uses the cache's memory, and store the answer if asked."""
        if cache.loading is not None:
            self.last.loaded = cache.loading.wait()
        cache.storing.captured()
        self.last.storing = (cache.storing,)
        if self.store_decode and not self._changed():
            whole = out if isinstance(out, torch.Tensor) else out.sequences
            cache.storing.wait()
            answer = cache.store_all(whole[0].cpu().numpy())
            answer.captured()
            self.last.storing += (answer,)
