"""transformers: `generate` that remembers, for causal LMs of Hugging Face on CPU or GPU.

    kept = Kept(model, config="tiered")
    out = kept.generate(input_ids, max_new_tokens=64)    # retrieves before prefill, then stores
    kept.last.hit_tokens

Loading overlaps the forward pass layer by layer, and so does storing. Whatever goes wrong under
way, the prompt is computed as if there were no cache.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import GenerationMixin

import tierloom
from tierloom.adapters.transformers.cache import (
    SPARE,
    Abandoned,
    KeptLayer,
    TierloomCache,
    layout_of,
)
from tierloom.adapters.transformers.model import (
    fingerprint,
    generated_with,
    inspect,
    rope,
    weight_files,
)
from tierloom.adapters.transformers.model_state import State, rest_id
from tierloom.adapters.transformers.shape import KVShape
from tierloom.stages.contract.request import Receipt
from tierloom.stages.contract.stage import ModelFacts
from tierloom.stages.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Abandoned", "KVShape", "Kept", "KeptLayer", "Request", "TierloomCache"]

PACE = {"graphs.store.pace.by": "layer", "graphs.retrieve.pace.by": "layer"}
"""Both graphs go at the model's pace here, whatever the configuration says."""

_REFUSED = {
    "cache": "the cache is this class's own: kept.cache() gives it out",
    "past_key_values": "the cache is this class's own: kept.cache() gives it out",
    "cache_implementation": "the cache is this class's own",
    "inputs_embeds": "KV is named by token ids",
    "token_type_ids": "KV is named by token ids alone",
    "token_healing": "KV is named by the prompt's tokens, which this changes",
    "position_ids": "KV is kept for positions 0, 1, 2, ...",
    "negative_prompt_ids": "guidance runs two sequences",
    "custom_generate": "what it does with the cache is not known",
    "penalty_alpha": "contrastive search runs several sequences",
    "dola_layers": "custom code generates then, and what it does with the cache is not known",
    "constraints": "beam search runs several sequences",
    "force_words_ids": "beam search runs several sequences",
} | dict.fromkeys(
    ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"),
    "assisted decoding is not supported",
)
_OPTIONS = {"logits_to_keep", "tokenizer", "trust_remote_code"} | signature(
    GenerationMixin.generate
).parameters.keys()
"""What `generate` takes besides the fields of a GenerationConfig and what it hands to a model."""


@dataclass(slots=True)
class Request:
    """What became of one `generate`."""

    prompt_tokens: int
    hit_tokens: int = 0
    """Tokens of the prompt that were loaded, not computed."""
    abandoned: str = ""
    """Why kept KV was planned for and then not used; empty when it was used."""
    ttft_s: float = 0.0
    """From the call to the first new token, lookup and load included."""
    seconds: float = 0.0
    """The whole call."""
    loaded: Receipt | None = None
    storing: tuple[Any, ...] = ()
    """Tickets of what is being stored; `wait()` on each gives its receipt."""


class Kept:
    """A causal LM whose KV outlives the request. One call at a time; owns its pipeline.

    Raises LayoutError for models whose KV cannot be kept and InputError for calls that cannot be
    served, each naming the reason.
    """

    def __init__(
        self, model: Any, *, config: str = "tiered", name: str = "", weights: str = "",
        salt: str = "", overrides: Mapping[str, Any] | None = None, store_decode: bool = False,
    ) -> None:  # fmt: skip
        """Open `config` for `model`, which must be in eval mode.

        A model that is changed later is seen at the next call, and its KV kept under another name
        from then on, in a pipeline opened anew. Seen is whatever torch counts, or replaces, and of
        each tensor a sample of values (writing through `.data` is not counted).

        `name`: defaults to the config's. `weights`: a content id of all that the model computes
        with, instead of hashing it; then changes are refused. `salt`: the tenant's secret.
        `store_decode`: keep the answer's KV too, so that the next turn of a chat hits all of this
        one.
        """
        self.model = getattr(model, "_orig_mod", model)  # of torch.compile, which wraps it
        self.store_decode, self._salt = store_decode, salt
        self.last = Request(0)
        self._config, self._overrides = config, PACE | dict(overrides or {})
        self._name = name or getattr(model.config, "name_or_path", "")
        self._name = self._name or model.config.model_type or type(model).__name__
        self._weights = weights
        self._touched: set[str] = set()
        """Tensors that were changed while this was open: they are named by all of their bytes."""
        self._names: tuple[str, ...] = ()
        self._watched()
        if not weights:
            rest_id(self.model)  # refuses before anything is run what could not be named
        self._open()

    def _watched(self) -> State:
        return State(self.model, vouched=bool(self._weights))

    def _open(self) -> None:
        """Open the pipeline for the model as it is, unless it is open for that."""
        self.shape = inspect(self.model)
        state = self._watched()
        names = self._named()
        if names != self._names:
            if self._names:
                self.close()
            # Two rows: the layout's self-test, at opening, then stands for caches of any length.
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
        """What the pipeline is named by, besides the model's name: its weights, RoPE, how else it
        computes with them, and the shape of its KV."""
        how = "" if self._weights else rest_id(self.model)
        weights = self._weights or fingerprint(self.model, self._touched)
        return weights, rope(self.model), how, str(self.shape)

    def _changed(self) -> str:
        """What of the model is not what it was when its KV got its name; empty for nothing."""
        try:
            found = self._watched().differs(self._state)
        except InputError as e:
            return f"the model ({e})"
        return found[0] if found else ""

    def _follow(self) -> None:
        """Give KV a new name where the model is no longer what it was. Raises InputError where the
        user gave the name."""
        found = self._watched().differs(self._state)
        if found is None:
            return
        if self._weights:
            raise InputError(
                f"{found[0]} of the model changed, and weights={self._weights!r} names it as it "
                "was: close this and open another with a new id"
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
        """A cache for this prompt `[1, tokens]`, with what is kept on its way into it.

        For those who call the model themselves, with `use_cache=True` and `cache=` or, before
        transformers 5.24, `past_key_values=`; they handle Abandoned, and call `storing.wait()` of
        it before they close this. Raises InputError.
        """
        if getattr(self.model.config, "use_cache", None) is False:
            raise InputError(
                "the model's config says use_cache=False, with which a forward may ignore a cache: "
                "set model.config.use_cache = True"
            )
        self._follow()
        return self._cache(input_ids, room=room, retrieve=retrieve, store=store)

    def _cache(self, input_ids: torch.Tensor, **how: Any) -> TierloomCache:
        return TierloomCache(
            self.pipe, self.shape, _prompt(input_ids), salt=self._salt, changed=self._changed, **how
        )

    def generate(
        self, input_ids: torch.Tensor, *, streamer: Any = None,
        attention_mask: torch.Tensor | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """`model.generate` for one prompt `[1, tokens]`, with its options and its result.

        `self.last` says what happened. Does not wait for what is being stored: see `flush`.
        """
        started = time.perf_counter()
        self._check(input_ids, attention_mask, options)
        self.last = Request(input_ids.shape[1])
        watch = Watch(streamer)
        room = self._room(input_ids.shape[1], options)
        self._follow()
        cache = self._cache(input_ids, room=room, stepwise=True)
        try:
            out = self._generate(cache, input_ids, watch, options)
        except Abandoned as e:
            self.last.abandoned = str(e)
            watch.skip_prompt()
            self._follow()
            cache = self._cache(input_ids, room=room, retrieve=False, stepwise=True)
            out = self._generate(cache, input_ids, watch, options)
        self.last.hit_tokens = cache.planned
        self._close(cache, out)
        self.last.ttft_s = watch.first - started
        if not cache.planned:
            self.pipe.note_prefill(self.last.prompt_tokens, self.last.ttft_s)
        self.last.seconds = time.perf_counter() - started
        return out

    def flush(self, timeout: float | None = None) -> None:
        """Wait until what the last call stores is kept, or given up."""
        for ticket in self.last.storing:
            ticket.wait(timeout)

    def close(self) -> None:
        self.flush()
        self.pipe.close()

    def __enter__(self) -> Kept:
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
        """Free the cache's memory of everything under way, and keep the answer if asked."""
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

    def _check(self, ids: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]) -> None:
        for key, why in _REFUSED.items():
            own = key == "cache_implementation"  # of a config, ours takes its place
            if (options.get(key) if own else self._said(key, options)) not in (None, False):
                raise InputError(f"{key}= cannot be combined with kept KV: {why}")
        for key in ("num_beams", "num_return_sequences"):
            if (self._said(key, options) or 1) != 1:
                raise InputError(f"{key} must be 1: kept KV is served to one sequence at a time")
        if options.get("use_cache") is False:
            raise InputError("use_cache=False leaves nothing to keep: call model.generate")
        known = _OPTIONS | vars(self.model.generation_config).keys()
        for key in (key for key, said in options.items() if said is not None and key not in known):
            raise InputError(
                f"{key}= goes to the model itself, and KV is named by token ids alone: call "
                "model.generate"
            )
        _prompt(ids)
        if mask is not None and (mask.shape != ids.shape or not bool(mask.bool().all())):
            raise InputError("attention_mask must be all ones: padded prompts are not kept")

    def _said(self, key: str, options: dict[str, Any]) -> Any:
        """An option of `generate`: said to it, else in the config given to it, else the model's."""
        places = (options.get("generation_config"), self.model.generation_config)
        found = (options.get(key), *(getattr(config, key, None) for config in places))
        return next((value for value in found if value is not None), None)

    def _room(self, prompt: int, options: dict[str, Any]) -> int:
        """Tokens to make room for; more are made room for when they come."""
        new, total = self._said("max_new_tokens", options), self._said("max_length", options)
        return int(new or max((total or 0) - prompt, SPARE))


class Watch:
    """A streamer that notes when the first new token comes, and passes all on to another."""

    def __init__(self, inner: Any = None) -> None:
        self.inner, self.first = inner, 0.0
        self._puts, self._skip = 0, False

    def skip_prompt(self) -> None:
        """A second run begins: its prompt, which transformers puts first, was passed on already."""
        self._puts, self._skip = 0, True

    def put(self, value: torch.Tensor) -> None:
        self._puts += 1
        if self._puts == 2 and not self.first:
            self.first = time.perf_counter()
        if self.inner is not None and not (self._skip and self._puts == 1):
            self.inner.put(value)

    def end(self) -> None:
        if self.inner is not None:
            self.inner.end()


def _prompt(ids: torch.Tensor) -> npt.NDArray[np.int64]:
    """The token ids of the one prompt in `[1, tokens]`. Raises InputError."""
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point():
        raise InputError("input_ids must be a [1, tokens] tensor of integers")
    if ids.shape[0] != 1:
        raise InputError(f"a batch of {ids.shape[0]}: kept KV is served to one prompt at a time")
    if not ids.shape[1]:
        raise InputError("an empty prompt")
    return ids[0].detach().cpu().numpy().astype(np.int64)
