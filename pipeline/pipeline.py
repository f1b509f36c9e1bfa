"""Pipeline: store, retrieve and look up KV by tokens. What `tierloom.open()` returns."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np

from ..stages.arena import Arena
from ..stages.base import Context
from ..stages.copy import warm_up
from ..stages.errors import Closed, ConfigError, InputError, LayoutError, Lost
from ..stages.inputs import tokens_array
from ..stages.namespace import Namespace
from ..stages.payload import Ticket
from ..stages.selftest import check_layout
from ..stages.tiers.base import TierContext
from ..stages.tiers.breaker import Guarded
from .flow import Flow
from .lower import lower
from .pool import Pool
from .portal import Portal, awaited, finished

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..stages.base import Stage
    from ..stages.layout import KVLayout
    from ..stages.payload import Receipt
    from .graph import PipelineSpec

log = logging.getLogger("tierloom")


class Pipeline:
    """One worker's cache. Thread-safe; close it, or use it as a context manager.

    `caches` in every call are the tensors that `layout` describes, one (or one K, V pair) per layer; they
    stay the caller's, and nothing touches them after the call's `wait()` has returned.
    """

    def __init__(
        self, spec: PipelineSpec, layout: KVLayout, *, model: str, weights: str = "", rope: str = "",
        layers: tuple[int, int] | None = None, heads: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        self.spec, self.layout = spec, layout
        self.native = _native(spec, layout)
        self.geometry = layout.geometry(native=self.native)
        self.off: str | None = None
        """Why nothing is cached any more; None: all is well."""
        self.prefill_rate = 0.0
        self._base = Namespace(
            model=model, weights=weights, rope=rope, geometry=str(self.geometry),
            layers=layers or (0, layout.layers), heads=heads or (0, layout.heads),
            layout=layout.fingerprint if self.native else b"",
            chunk=(spec.chunk.tokens, spec.chunk.grain),
        )  # fmt: skip
        self._seeds: OrderedDict[tuple[Any, ...], bytes] = OrderedDict()
        self._proven: set[tuple[int, ...]] = set()
        self.arena = Arena(
            spec.budget.arena,
            sum(t.options.capacity for t in spec.tiers.values() if getattr(t.cls, "in_arena", False)),
        )
        if layout.device == "cuda":
            self.arena.pin()
        warm_up(layout.device)
        self.tiers: dict[str, Guarded] = {}
        self._flows: dict[str, Flow] = {}
        self._pools = (Pool(spec.budget.threads, "work"), Pool(spec.budget.threads, "io"))
        self._portal = Portal(self._live)
        self._closed = False
        try:
            self._portal.start()
        except BaseException:
            self._release()
            raise

    # -- the three calls ---------------------------------------------------------------------------

    def lookup(self, tokens: Any, *, salt: str = "", adapter: str = "", tags: Mapping[str, str] | None = None) -> int:
        """Tokens of the longest kept prefix, rounded down to the grain. Asks indexes in this process
        only, in the caller's thread; remote tiers are asked by `alookup` and `retrieve`."""
        self._check_open()
        ticket = self._question(tokens, salt=salt, adapter=adapter, tags=tags)
        if self.off or "retrieve" not in self._flows:
            return 0
        self._flows["retrieve"].peek(ticket)
        return sum(p.take for p in ticket.pieces)

    def store(self, tokens: Any, caches: Sequence[Any], slots: Any = None, **names: Any) -> Ticket:
        """Keep the KV of `tokens`, found at `slots` of `caches`. Returns at once.

        `slots`: int64 token slots, one per token; or `blocks=` a block table. `salt=`, `adapter=`,
        `tags=` name the tenant, `layout=` another layout of the same geometry. The slots must not be
        overwritten until `captured()` or `wait()` has returned. Raises InputError.
        """
        return self._submit("store", tokens, caches, slots, **names)

    def retrieve(self, tokens: Any, caches: Sequence[Any], slots: Any = None, **names: Any) -> Ticket:
        """Bring the longest kept prefix of `tokens` into `caches`; arguments as for `store`."""
        return self._submit("retrieve", tokens, caches, slots, **names)

    def begin_store(self, tokens: Any, caches: Sequence[Any], slots: Any = None, **names: Any) -> Ticket:
        """`store`, layer by layer behind the model: call `layer_done(i)` as each layer is computed."""
        return self._submit("store", tokens, caches, slots, layered=True, **names)

    def begin_retrieve(self, tokens: Any, caches: Sequence[Any], slots: Any = None, **names: Any) -> Ticket:
        """`retrieve`, layer by layer ahead of the model: call `wait_layer(i)` before each layer."""
        return self._submit("retrieve", tokens, caches, slots, layered=True, **names)

    async def astore(self, tokens: Any, caches: Sequence[Any], slots: Any = None, **names: Any) -> Receipt:
        """`store(...).wait()`, for a coroutine of any loop."""
        return await finished(self.store(tokens, caches, slots, **names))

    async def aretrieve(self, tokens: Any, caches: Sequence[Any], slots: Any = None, **names: Any) -> Receipt:
        """`retrieve(...).wait()`, for a coroutine of any loop."""
        return await finished(self.retrieve(tokens, caches, slots, **names))

    async def alookup(self, tokens: Any, **names: Any) -> int:
        """`lookup`, remote tiers included."""
        self._check_open()
        ticket = self._question(tokens, **names)
        if self.off or "retrieve" not in self._flows:
            return 0
        tokens = await awaited(self._portal.begin(self._flows["retrieve"].plan, ticket))
        return int(tokens)

    # -- around them ---------------------------------------------------------------------------------

    def note_prefill(self, tokens: int, seconds: float) -> None:
        """Tell how long the engine took to compute `tokens`, so that `worth: auto` can decide."""
        if tokens > 0 and seconds > 0:
            rate = tokens / seconds
            self.prefill_rate = rate if not self.prefill_rate else 0.8 * self.prefill_rate + 0.2 * rate

    def stats(self) -> dict[str, Any]:
        """Counters of stages, tiers and arena, as plain numbers."""
        return {
            "stages": {
                g: {id: m.read() for id, m in flow.meters.items()} for g, flow in self._flows.items()
            },
            "graphs": {
                g: {"open": len(f.open), "dropped": f.dropped, "degraded": f.degraded}
                for g, f in self._flows.items()
            },
            "tiers": {name: tier.figures() for name, tier in self.tiers.items()},
            "arena": {
                "used": self.arena.used, "flight": self.arena.flight,
                "total": self.arena.total, "leases": self.arena.leases,
            },
            "off": self.off,
        }  # fmt: skip

    def clear(self) -> int:
        """Forget everything in every tier; how many objects there were."""
        self._check_open()

        async def all_of_it() -> int:
            return sum([await tier.clear() for tier in self.tiers.values()])

        count: int = self._portal.call(all_of_it)
        return count

    def pin(self, tokens: Any, *, pinned: bool = True, **names: Any) -> int:
        """Keep the chunks of `tokens` from eviction in local tiers, or let them go; how many."""
        self._check_open()
        ticket = self._question(tokens, **names)
        self._flows["retrieve"].peek(ticket)
        keys = [p.source for p in ticket.pieces]

        async def all_tiers() -> int:
            return sum(t.pin(keys, pinned=pinned) for t in self.tiers.values() if t.local)

        count: int = self._portal.call(all_tiers)
        return count

    def explain(self) -> str:
        """What runs, as text."""
        from .explain import explain

        return explain(self.spec)

    def close(self) -> None:
        """End every request (what is under way is given up), close the tiers, free the arena."""
        if not self._closed:
            self._closed = True
            self._portal.close()
            self._release()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- inside ------------------------------------------------------------------------------------------

    def _submit(
        self, graph: str, tokens: Any, caches: Sequence[Any], slots: Any, *, blocks: Any = None,
        layout: KVLayout | None = None, layered: bool = False, **names: Any,
    ) -> Ticket:  # fmt: skip
        self._check_open()
        if graph not in self._flows:
            raise ConfigError(f"{self.spec.source} has no graph '{graph}'")
        layout = layout or self.layout
        array = tokens_array(tokens)
        if (slots is None) == (blocks is None):
            raise InputError("pass either slots= or blocks=")
        if layout is not self.layout and layout.geometry(native=self.native) != self.geometry:
            raise LayoutError(
                f"this pipeline keeps {self.geometry}, the layout given holds "
                f"{layout.geometry(native=self.native)}"
            )
        if blocks is not None:
            rows = layout.slots_of_blocks(blocks, len(array))
        else:
            rows = layout.check_slots(slots, len(array))
        if self.native:
            rows = layout.block_rows(rows)
        table = layout.planes(caches, native=self.native)
        if self.off is None:
            self._prove(layout, caches)
        ticket = self._ticket(graph, array, rows, table, (caches, rows), **names)
        if self.off is not None:
            ticket.tally(Lost.BAD_LAYOUT)
            ticket.finish()
            return ticket
        if layered:
            pace = self.spec.graphs[graph].options.pace
            ticket.layered = pace.by == "layer"
            if graph == "store":
                ticket.allowed = 0
            elif ticket.layered:
                ticket.window, ticket.allowed = pace.window, min(pace.window, ticket.groups)
        self._portal.post(self._flows[graph].submit, ticket)
        return ticket

    def _ticket(
        self, graph: str, tokens: Any, rows: Any, table: Any, keep: Any, *, salt: str = "",
        adapter: str = "", tags: Mapping[str, str] | None = None, deadline: float | None = None,
    ) -> Ticket:  # fmt: skip
        group = self.spec.chunk.group
        ticket = Ticket(
            graph, tokens, self._seed(salt, adapter, tags), table=table, slots=rows, keep=keep,
            groups=-(-self.geometry.layers // group), group=group,
            seconds=deadline or self.spec.graphs[graph].options.deadline,
            post=lambda t: self._portal.post(self._flows[graph].poke, t),
        )  # fmt: skip
        ticket.prefill_rate = self.prefill_rate
        return ticket

    def _question(self, tokens: Any, **names: Any) -> Ticket:
        """A ticket that only asks."""
        return self._ticket("retrieve", tokens_array(tokens), np.empty(0, np.int64), None, None, **names)

    def _seed(self, salt: str, adapter: str, tags: Mapping[str, str] | None) -> bytes:
        """The digest that starts a tenant's chains."""
        name = (salt, adapter, tuple(sorted((tags or {}).items())))
        seed = self._seeds.get(name)
        if seed is None:
            seed = self._base.of(salt=salt, adapter=adapter, tags=name[2]).digest
            self._seeds[name] = seed
            if len(self._seeds) > 1024:
                self._seeds.popitem(last=False)
        return seed

    def _prove(self, layout: KVLayout, caches: Sequence[Any]) -> None:
        """The layout's self-test, once for each shape; a layout that fails turns caching off."""
        shape = (hash(layout.order), layout.blocks > 1, *layout.stride)
        if shape in self._proven:
            return
        try:
            check_layout(layout, caches, native=self.native)
        except LayoutError as error:
            self.off = str(error)
            log.error("caching is off: %s", error)
        self._proven.add(shape)

    def _check_open(self) -> None:
        if self._closed or not self._portal.alive:
            raise Closed("the pipeline is closed: open a new one")

    async def _live(self, stop: asyncio.Event, ready: Callable[[], None]) -> None:
        """The portal's main: everything that has a life, from opening tiers to closing them."""
        from contextlib import AsyncExitStack

        async with AsyncExitStack() as home:
            for name, t in self.spec.tiers.items():
                ctx = TierContext(self.arena, self._base.digest, self._pools[1])
                made: Any = t.cls  # every tier takes (options, context)
                tier = Guarded(made(t.options, ctx), name, t.breaker)
                home.push_async_callback(tier.close)
                await tier.open()
                self.tiers[name] = tier
            async with anyio.create_task_group() as tasks:
                for graph in self.spec.graphs.values():
                    flow = self._flow(graph)
                    home.callback(flow.close)
                    flow.start(tasks)
                    self._flows[graph.name] = flow
                ready()
                await stop.wait()
                await self._drain()
                tasks.cancel_scope.cancel()

    def _flow(self, graph: Any) -> Flow:
        memory = frozenset(n for n, t in self.spec.tiers.items() if getattr(t.cls, "in_arena", False))
        ctx = Context(
            graph=graph.name, chunk=self.spec.chunk, geometry=self.geometry,
            device=self.layout.device, namespace=self._base.digest, memory=memory,
            trusted=memory if self.spec.verify == "remote" else frozenset(),
            arena=self.arena, tiers=self.tiers, pool=self._pools[0],
        )  # fmt: skip
        stages: dict[str, Stage] = {n.id: n.cls(n.options, ctx) for n in graph.nodes}
        return Flow(
            graph, lower(graph), stages, pool=self._pools[0], arena=self.arena,
            object_bytes=self.geometry.frame_bytes(self.geometry.layers, self.spec.chunk.tokens) + 4096,
            inflight=self.spec.budget.inflight,
        )  # fmt: skip

    async def _drain(self, seconds: float = 5.0) -> None:
        """Give up what is open and wait until every lease is on its way home."""
        for flow in self._flows.values():
            for ticket in list(flow.open):
                ticket.expire(Lost.CANCELLED)
                flow.poke(ticket)
        with anyio.move_on_after(seconds):
            while any(flow.open for flow in self._flows.values()):
                await anyio.sleep(0.005)

    def _release(self) -> None:
        for pool in self._pools:
            pool.close()
        if not self.arena.leases:
            self.arena.close()


def _native(spec: PipelineSpec, layout: KVLayout) -> bool:
    """Native order where canonical would cost more, and nothing in the graphs needs canonical."""
    fits = spec.chunk.tokens % layout.block_tokens == 0 and "S" not in layout.order
    if spec.order == "native" and not fits:
        raise ConfigError(
            f"order: native wants chunk.tokens ({spec.chunk.tokens}) to be a multiple of the "
            f"engine's block ({layout.block_tokens})"
        )
    if spec.order == "auto":
        return fits and not layout.rows_contiguous and layout.dense_blocks
    return spec.order == "native"
