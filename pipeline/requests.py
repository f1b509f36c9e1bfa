"""A caller's arguments, checked, as a request: names, rows of the cache and pointers to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from inspect import Parameter, signature
from typing import Any

import numpy as np

from tierloom.pipeline.config.problems import nearest
from tierloom.pipeline.config.spec import PipelineSpec
from tierloom.stages.contract.blended import Blended
from tierloom.stages.contract.gates import Launches
from tierloom.stages.contract.request import EngineMemory, Request
from tierloom.stages.errors import ConfigError, InputError, LayoutError
from tierloom.stages.kv.block_table import block_table
from tierloom.stages.kv.chain_seed import chain_seed
from tierloom.stages.kv.layout import KVLayout
from tierloom.stages.kv.layout_check import SelfTests
from tierloom.stages.kv.namespace import Namespace
from tierloom.stages.kv.object import Object
from tierloom.stages.kv.paged_copy import fence
from tierloom.stages.kv.pointer_cache import PointerCache
from tierloom.stages.kv.prefix import Span
from tierloom.stages.kv.text import Run
from tierloom.stages.kv.tokens import tokens_array

KEYWORDS = (
    "tokens", "caches", "slots", "adapter", "after", "blend", "blocks", "deadline", "exact", "held",
    "ids", "layout", "salt", "tags", "trace",
)  # fmt: skip
"""What store and retrieve can be told."""
_KEYWORD = Parameter.KEYWORD_ONLY


class Requests:
    """Makes the requests of one pipeline. Any thread."""

    def __init__(
        self, spec: PipelineSpec, layout: KVLayout, names: Namespace, *, native: bool
    ) -> None:
        """`names`: whose KV it is; tenants are added to it. `native`: blocks are kept as they
        are."""
        self.prefill_rate = 0.0
        """Tokens/s at which the engine computes; 0: not known."""
        self._spec, self._names, self._native = spec, names, native
        self._geometry, self._device = layout.geometry(native=native), layout.device
        self._seed = lru_cache(1024)(self._seed_of)
        self._tables = PointerCache()
        self._selftests = SelfTests(native=native)
        self.event = partial(fence, self._device)
        """What a copy that is asked for now must wait for."""

    def make(
        self, graph: str, tokens: Any, caches: Sequence[Any], slots: Any, *, layout: KVLayout,
        seconds: float, blocks: Any = None, held: dict[bytes, Object] | None = None,
        blend: bool | Sequence[Run] = False, exact: int = 1 << 62, after: Any = None,
        trace: str = "", **names: Any,
    ) -> Request:  # fmt: skip
        """A store or retrieve; arguments as for `Pipeline.store`. `after`: an `event` of before,
        behind which the caller's memory may be touched; None: one of now. Raises InputError."""
        wanted = (tokens.wanted or tokens.tokens) if isinstance(tokens, Span) else len(tokens)
        if (slots is None) == (blocks is None):
            raise InputError("pass either slots= or blocks=")
        if blocks is not None:
            rows = layout.rows_of_blocks(blocks, wanted, native=self._native)
            spare = block_table(blocks).spare if graph == "store" else 0
            if graph == "store" and (rows[0 if self._native else spare :] < 0).any():
                raise InputError("blocks leave some out (-1): what is stored is stored whole")
        else:
            spare = 0
            rows = layout.check_slots(slots, wanted)
            rows = layout.block_rows(rows) if self._native else rows
        table = self._tables.of(layout, caches, native=self._native)
        launches = Launches() if self._device != "cpu" else None
        memory = EngineMemory(table, rows, (caches, rows), after or self.event(), launches)
        request = self._request(graph, tokens, memory, seconds=seconds, **names)
        request.spare, request.held, request.exact = spare, held or {}, exact
        request.trace = trace
        if blend is not False:
            if graph != "retrieve" or not len(request.tokens):
                raise InputError("blend= is for a retrieve whose token ids are passed")
            request.blend = Blended(None if blend is True else list(blend))
        return request

    def question(self, tokens: Any, *, deadline: float | None = None, **names: Any) -> Request:
        """A retrieve that is only planned."""
        seconds = deadline or self._spec.graphs["retrieve"].options.deadline
        nothing = EngineMemory(None, np.empty(0, np.int64), None)
        return self._request("retrieve", tokens, nothing, seconds=seconds, **names)

    def note_prefill(self, tokens: int, seconds: float) -> None:
        if tokens > 0 and seconds > 0:
            rate = tokens / seconds
            before = self.prefill_rate or rate
            self.prefill_rate = 0.8 * before + 0.2 * rate

    def failure(self, layout: KVLayout) -> str | None:
        """Why KV of this layout cannot be kept, by a self-test when it is new; None: it can be.
        Raises LayoutError unless it holds what is kept here."""
        given = layout.geometry(native=self._native), layout.device
        if given != (self._geometry, self._device):
            raise LayoutError(
                f"this pipeline keeps {self._geometry} on {self._device}, the layout given "
                f"holds {given[0]} on {given[1]}"
            )
        return self._selftests.failure(layout)

    def _request(
        self, graph: str, tokens: Any, memory: EngineMemory, *, seconds: float, salt: str = "",
        adapter: str = "", tags: Mapping[str, str] | None = None, ids: Any = (), **unknown: Any,
    ) -> Request:  # fmt: skip
        if unknown:
            raise unknown_keyword(graph, next(iter(unknown)), KEYWORDS)
        span = tokens if isinstance(tokens, Span) else None
        seed = self._seed(salt, adapter, tuple(sorted((tags or {}).items()))) if not span else b""
        return Request(
            graph, tokens_array(ids if span else tokens), seed, memory, span=span,
            layers=self._geometry.layers, group=self._spec.chunk.group,
            deadline=time.monotonic() + seconds, prefill_rate=self.prefill_rate,
        )  # fmt: skip

    def _seed_of(self, salt: str, adapter: str, tags: tuple[tuple[str, str], ...]) -> bytes:
        """The digest that starts a tenant's chains."""
        names = self._names.of(salt=salt, adapter=adapter, tags=tags)
        return chain_seed(names, self._spec.chunk.keys)


def check_keywords(call: str, given: Collection[str], *having: Callable[..., Any]) -> None:
    """Raise TypeError for keywords that none of these functions has, with the nearest one."""
    known = {p.name for f in having for p in signature(f).parameters.values() if p.kind is _KEYWORD}
    if unknown := [name for name in given if name not in known]:
        raise unknown_keyword(call, unknown[0], known)


def unknown_keyword(call: str, name: str, known: Iterable[str]) -> TypeError:
    return TypeError(f"{call}() has no keyword {name!r}: {nearest(name, known)}")


def native_order(spec: PipelineSpec, layout: KVLayout) -> bool:
    """Native order where canonical would cost more, and nothing in the graphs needs canonical."""
    fits = spec.chunk.tokens % layout.block_tokens == 0 and "S" not in layout.order
    if spec.order == "native" and not fits:
        raise ConfigError(
            f"order: native wants chunk.tokens ({spec.chunk.tokens}) to be a multiple of the "
            f"engine's block ({layout.block_tokens})"
        )
    if spec.order == "auto":
        shares = spec.chunk.keys == "sglang"  # with engines of another layout
        nodes = [n for graph in spec.graphs.values() for n in graph.nodes]
        if shares or any(n.cls.canonical or n.cls.reads_texts(n.options) for n in nodes):
            return False
        return fits and not layout.rows_contiguous and layout.dense_blocks
    return spec.order == "native"
