"""Pipeline: store, retrieve and look up KV by tokens. What `tierloom.open()` returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from tierloom.pipeline.config.spec import PipelineSpec
from tierloom.pipeline.requests import Requests, native_order
from tierloom.pipeline.run.loop_thread import awaited, finished
from tierloom.pipeline.runtime import Change, Worker
from tierloom.pipeline.shown import Shown
from tierloom.stages.contract.request import Receipt
from tierloom.stages.contract.stage import ModelFacts
from tierloom.stages.contract.ticket import Ticket
from tierloom.stages.errors import Closed, ConfigError, Lost, TierDown
from tierloom.stages.kv.layout import KVLayout
from tierloom.stages.kv.namespace import Namespace
from tierloom.stages.kv.object import LINK, Object
from tierloom.stages.kv.prefix import Span
from tierloom.stages.kv.rope import Rotation, rotation as rotation_of

if TYPE_CHECKING:
    from tierloom.pipeline.handoff.handoff import Handoff


class Pipeline(Shown):
    """One worker's cache. Thread-safe; close it, or use it as a context manager.

    `caches` in every call are the tensors that `layout` describes, one (or one K, V pair) per
    layer; they stay the caller's, and nothing touches them after the call's `wait()` has returned.
    """

    def __init__(
        self, spec: PipelineSpec, layout: KVLayout, *, model: str, weights: str = "",
        rope: str = "", layers: tuple[int, int] | None = None,
        heads: tuple[int, int] | None = None, part: str = "", backend: str = "",
        facts: ModelFacts | None = None, replica: bool = False,
        watch: bool | Callable[[Change], None] = False, rotation: Rotation | None = None,
    ) -> None:  # fmt: skip
        """`layers`, `heads`, `part`: which share of the model's KV `layout` holds. `backend`: whose
        native blocks these are, where the layout alone does not say it. `replica`: another process
        has the same KV. `watch`: `changes()` will be called; or a function that is told of each,
        on whatever thread it happens. `rotation`: how K turns, from a table of the engine's own;
        default: as `rope` says, if its kind is known. A layout that fails its self-test turns
        caching `off`. Raises ConfigError, TierDown; LayoutError where a GPU cannot have the arena.
        """
        self.spec, self.layout = spec, layout
        self.native = native_order(spec, layout)
        self.geometry = layout.geometry(native=self.native)
        bound = sha256(layout.fingerprint + backend.encode()).digest()
        self._base = Namespace(
            model=model, weights=weights, rope=rope, geometry=str(self.geometry),
            layers=layers or (0, layout.layers), heads=heads or (0, layout.heads), part=part,
            layout=bound if self.native else b"",
            chunk=(spec.chunk.tokens, spec.chunk.grain),
        )  # fmt: skip
        self.chains = self._base  # see `seeded_by`
        self._requests = Requests(spec, layout, self._base, native=self.native)
        self.event = self._requests.event  # for `after=`: behind all that is launched by now
        self._worker = Worker(
            spec, self.geometry, layout.device, self._base, facts, replica=replica, watch=watch,
            rotation=rotation or rotation_of(rope, layout.dim, layout.layers),
        )  # fmt: skip
        self.arena, self.tiers = self._worker.arena, self._worker.tiers
        self._runners, self._portal = self._worker.runners, self._worker.portal
        self.handoff: Handoff | None = self._worker.handoff
        self._closed = False
        self.off: str | None = self._requests.failure(layout)
        """Why nothing is cached any more; None: all is well."""

    def lookup(
        self, tokens: Any, *, salt: str = "", adapter: str = "",
        tags: Mapping[str, str] | None = None,
    ) -> int:  # fmt: skip
        """Tokens of the longest prefix that indexes in this process know, in whole grains."""
        self._check_open()
        if self.off or "retrieve" not in self._runners:
            return 0
        request = self._requests.question(tokens, salt=salt, adapter=adapter, tags=tags)
        self._runners["retrieve"].peek(request)
        return sum(c.wanted for c in request.chunks)

    def store(self, tokens: Any, caches: Sequence[Any], slots: Any = None, **names: Any) -> Ticket:
        """Keep the KV of `tokens`, found at `slots` of `caches`. Returns at once.

        `slots`: int64 token slots, one per token; or `blocks=` a block table: a `BlockTable`, or
        block ids where the tokens begin with the first of them. A retrieve leaves out block -1;
        a store wants all. `salt=`, `adapter=`, `tags=` name the tenant; a `Span` of a `Chain`
        instead of tokens has named it. `layout=`: another layout of the same geometry. The slots
        must not be overwritten until `captured()` or `wait()` has returned. `ids=`: the token ids
        that a span names, where graphs find text by content. `exact=`: tokens, from the first on,
        whose KV was computed over nothing captured elsewhere; what follows is never kept under
        names that a prefix finds. `trace=`: a `traceparent`, for who follows. Raises InputError.
        """
        return self._submit("store", tokens, caches, slots, **names)

    def retrieve(
        self, tokens: Any, caches: Sequence[Any], slots: Any = None, **names: Any
    ) -> Ticket:
        """Bring the longest kept prefix of `tokens` into `caches`; arguments as for `store`.
        `after=`: what `event()` gave, behind which its copies may begin; by default one of now.

        `blend=True`: and text behind it that was captured elsewhere, if the graph looks for it; or
        runs of it that the caller has found. `Ticket.compute()` then says what the engine computes.
        That KV is approximate: keep it out of exact caches.
        """
        return self._submit("retrieve", tokens, caches, slots, **names)

    def begin_store(
        self, tokens: Any, caches: Sequence[Any], slots: Any = None, **names: Any
    ) -> Ticket:
        """`store`, layer by layer after the model: call `layer_done(i)` after each layer."""
        return self._submit("store", tokens, caches, slots, layered=True, **names)

    def begin_retrieve(
        self, tokens: Any, caches: Sequence[Any], slots: Any = None, **names: Any
    ) -> Ticket:
        """`retrieve`, layer by layer ahead of the model: call `wait_layer(i)` before each layer."""
        return self._submit("retrieve", tokens, caches, slots, layered=True, **names)

    async def astore(
        self, tokens: Any, caches: Sequence[Any], slots: Any = None, **names: Any
    ) -> Receipt:
        """`store(...).wait()`, for a coroutine of any loop."""
        return await finished(self.store(tokens, caches, slots, **names))

    async def aretrieve(
        self, tokens: Any, caches: Sequence[Any], slots: Any = None, **names: Any
    ) -> Receipt:
        """`retrieve(...).wait()`, for a coroutine of any loop."""
        return await finished(self.retrieve(tokens, caches, slots, **names))

    async def alookup(self, tokens: Any, **names: Any) -> int:
        """`lookup`, remote tiers included."""
        found: int = await awaited(self.begin_lookup(tokens, **names))
        return found

    def begin_lookup(self, tokens: Any, **names: Any) -> Future[int]:
        """`alookup` for a caller without a loop: returns at once."""
        self._check_open()
        if self.off or "retrieve" not in self._runners:
            nothing: Future[int] = Future()
            nothing.set_result(0)
            return nothing
        request = self._requests.question(tokens, **names)
        return self._portal.begin(self._runners["retrieve"].plan, request)

    def note_prefill(self, tokens: int, seconds: float) -> None:
        """Tell how long the engine took to compute `tokens`, so that `worth: auto` can decide."""
        self._requests.note_prefill(tokens, seconds)

    @property
    def prefill_rate(self) -> float:
        """Tokens/s at which the engine computes; 0: not known."""
        return self._requests.prefill_rate

    @prefill_rate.setter
    def prefill_rate(self, rate: float) -> None:
        self._requests.prefill_rate = rate

    def stats(self) -> dict[str, Any]:
        """Counters of stages, tiers and arena, as plain numbers."""
        flows, serving = self._runners.items(), self._worker.serving
        return {
            "stages": {g: {id: m.read() for id, m in f.meters.items()} for g, f in flows},
            "graphs": {g: f.figures() for g, f in flows},
            "tiers": {name: tier.figures() for name, tier in self.tiers.items()},
            "arena": self.arena.figures(),
            "off": "the pipeline is closed" if self._closed else self.off,
            **({"draining": True} if (a := self._worker.admin) and a.drains else {}),
            **({"serve": serving.figures()} if serving is not None else {}),
            **({"handoff": self.handoff.figures()} if self.handoff is not None else {}),
            **({"measured": measured.read()} if (measured := self._worker.measures) else {}),
        }

    def measure(self) -> None:
        """From now on count requests, time tiers' calls and follow some objects' lives, for
        `stats()`, where it is `measured`. Once is enough."""
        self._worker.measure()

    def clear(self, *, local: bool = False) -> int:
        """Forget everything that this pipeline keeps, stores under way included; how many objects
        there were. `local`: only in tiers that are this process's own.

        Raises TierDown, naming the tiers that did not do it; the others have.
        """
        self._check_open()
        count, refused = self._portal.call(self._worker.clear, local)
        if refused:
            raise TierDown(f"not cleared: {', '.join(refused)}")
        return int(count)

    def changes(self, most: int = 4096) -> list[Change]:
        """What came to local tiers and went since the last call, in order, up to `most`; begins
        with what was there at the start. Pipelines opened with `watch` only."""
        seen = self._worker.changes
        return [seen.popleft() for _ in range(min(most, len(seen)))]

    @property
    def unseen(self) -> int:
        """How many changes are left for the next call of `changes()`."""
        return len(self._worker.changes)

    def whole(self, layers: int, heads: int) -> Namespace:
        """The namespace of the whole model of which this pipeline holds a share; what it holds all
        of has its own. Seeds chains that all shares have in common."""
        g, split = replace(self.geometry, layers=layers), heads // self.layout.heads
        g = replace(g, dim=g.dim * split) if self.native else replace(g, heads=g.heads * split)
        shares = {"layers": (0, layers), "heads": (0, heads), "part": ""}
        return replace(self._base, geometry=str(g), **shares)  # type: ignore[arg-type]

    def seeded_by(self, names: Namespace) -> None:
        """Chains begin with another namespace's digest than this pipeline's own."""
        self.chains = names
        self.introduce(names)

    def introduce(self, names: Namespace | None = None, *, door: str = "") -> None:
        """Tell a directory that, or at which URL this process takes orders."""
        if self._worker.announced is not None:
            self._worker.announced.describe(names, door=door)

    def pin(self, tokens: Any, *, pinned: bool = True, **names: Any) -> int:
        """Keep the chunks of `tokens` from eviction in local tiers, or let them go; how many."""
        keys = [key for key, _ in self.find(tokens, **names)]

        async def all_tiers() -> int:
            return sum(t.pin(keys, pinned=pinned) for t in self.tiers.values() if t.local)

        count: int = self._portal.call(all_tiers)
        return count

    def find(self, tokens: Any, **names: Any) -> list[tuple[bytes, int]]:
        """Keys of the longest kept prefix, and how many tokens each is good for; as `lookup`."""
        self._check_open()
        if "retrieve" not in self._runners:
            return []
        request = self._requests.question(tokens, **names)
        self._runners["retrieve"].peek(request)
        return [(c.source.key, c.wanted) for c in request.chunks if c.source is not None]

    @property
    def serves_at(self) -> str:
        """Where other engines read what this one keeps, as their tier `peer` names it; empty:
        nowhere."""
        return self._worker.serving.address if self._worker.serving is not None else ""

    @property
    def names(self) -> Namespace:
        """Whose KV this is, but for tenants."""
        return self._base

    def hold(self, span: Span) -> dict[bytes, Object] | None:
        """The objects of a span of whole chunks, by key, where all of them lie in a memory tier.
        They stay there until the caller releases each one's lease; `held=` of `begin_retrieve` then
        brings them without a lookup. None: not all are there. No I/O, no wait; any thread."""
        self._check_open()
        tiers = [t for t in self.tiers.values() if t.in_arena and t.available]
        step = self.spec.chunk.tokens // self.spec.chunk.grain * LINK
        held: dict[bytes, Object] = {}
        for at in range(0, len(span.links), step):
            chunk = span.links[at : at + step]
            object = next((o for t in tiers if (o := t.hold(chunk[-LINK:])) is not None), None)
            if (
                object is None
                or object.header.links != chunk
                or object.header.geometry != self.geometry
            ):
                for other in (*held.values(), *([object] if object is not None else [])):
                    other.lease.release()
                return None
            held[chunk[-LINK:]] = object
        return held

    def prefetch(self, span: Callable[[], Span], caches: Sequence[Any]) -> None:
        """Have what of a span lies in colder tiers read, verified and promoted, and placed nowhere.
        Returns at once: all of it, `span()` included, is done on the pipeline's own thread.
        `caches`: as for `retrieve`."""
        self._check_open()
        self._portal.post(self._prefetch, span, caches)

    def _prefetch(self, span: Callable[[], Span], caches: Sequence[Any]) -> None:
        if self._closed:
            return
        named = span()
        blocks = [-1] * -(-named.tokens // self.layout.block_tokens)
        self.retrieve(named, caches, blocks=blocks)

    def explain(self) -> str:
        """What runs, as text."""
        from tierloom.pipeline.config.explain import explain

        return explain(self.spec)

    def close(self) -> None:
        """End every request (what is under way is cancelled), close the tiers, free the arena. In a
        child that was forked nothing of it is there, and nothing is done."""
        if not self._closed:
            self._closed = True
            self._worker.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _submit(
        self, graph: str, tokens: Any, caches: Sequence[Any], slots: Any, *,
        layout: KVLayout | None = None, layered: bool = False, deadline: float | None = None,
        **names: Any,
    ) -> Ticket:  # fmt: skip
        self._check_open()
        if graph not in self._runners:
            raise ConfigError(f"{self.spec.source} has no graph '{graph}'")
        if layout is not None and layout is not self.layout:
            failure = self._requests.failure(layout)
            self.off = self.off or failure
        options, runner = self.spec.graphs[graph].options, self._runners[graph]
        seconds = options.deadline if deadline is None else deadline
        idle = options.pace.idle if layered else 0.0
        request = self._requests.make(
            graph, tokens, caches, slots, layout=layout or self.layout, seconds=idle or seconds,
            **names,
        )  # fmt: skip
        post, event = partial(self._portal.post, runner.poke), self._requests.event
        ticket = Ticket(
            request, post, seconds=seconds, idle=idle, event=event, device=self.layout.device
        )
        if self.off is not None:
            request.tally(Lost.BAD_LAYOUT)
            request.finish()
            return ticket
        if layered:
            request.layered = options.pace.by == "layer"
            if graph == "store":
                request.allowed = 0
            elif request.layered:
                request.window = options.pace.window
                request.allowed = min(request.window, request.groups)
        self._portal.post(runner.submit, request)
        return ticket

    def _check_open(self) -> None:
        if self._closed or not self._portal.alive:
            raise Closed("the pipeline is closed: open a new one")
