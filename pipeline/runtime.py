"""What lives as long as a pipeline: arena, pools, tiers and graphs, on the portal's thread."""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import anyio

from tierloom.pipeline.config.segments import lower
from tierloom.pipeline.config.spec import Breaker, Graph, PipelineSpec
from tierloom.pipeline.kept_texts import KeptTexts
from tierloom.pipeline.run.graph_runner import GraphRunner
from tierloom.pipeline.run.loop_thread import Portal
from tierloom.pipeline.run.threads import Pool
from tierloom.pipeline.run.tier_stack import open_tiers
from tierloom.stages.contract.stage import Context, ModelFacts, Stage
from tierloom.stages.errors import ConfigError, Lost
from tierloom.stages.kv.geometry import Geometry
from tierloom.stages.kv.namespace import Namespace
from tierloom.stages.kv.object import Object, object_bytes
from tierloom.stages.kv.paged_copy import warm_up
from tierloom.stages.kv.rope import Rotation
from tierloom.stages.kv.text import Text
from tierloom.stages.memory.arena import Arena
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker
from tierloom.stages.tiers.contract.tier import TierContext

if TYPE_CHECKING:
    from tierloom.pipeline.admin.store_admin import StoreAdmin
    from tierloom.pipeline.handoff.handoff import Handoff
    from tierloom.pipeline.run.measures import Measures
    from tierloom.pipeline.serve.announced import AnnouncedTiers
    from tierloom.pipeline.serve.engine_listener import EngineListener
    from tierloom.pipeline.serve.page_events import PageEvents


class Change(NamedTuple):
    """An object that came to a local tier, or went."""

    tier: str
    kept: bool
    links: bytes
    """Its grain links; the last is its key."""
    text: Text | None = None
    """Of one that came, where its header has it. Told again once it was read after a restart."""


class Worker:
    """Opened whole or not at all; `close()` gives everything back."""

    def __init__(
        self, spec: PipelineSpec, geometry: Geometry, device: str, names: Namespace,
        facts: ModelFacts | None = None, *, replica: bool = False,
        watch: bool | Callable[[Change], None] = False, rotation: Rotation | None = None,
    ) -> None:  # fmt: skip
        """`names`: whose digest every object carries. `watch`: keep `changes`, which the
        caller must empty, or tell a function of each. `rotation`: how K turns, where that is known.
        Raises ConfigError, TierDown; LayoutError
        where a GPU cannot be given the arena."""
        nodes = [n for graph in spec.graphs.values() for n in graph.nodes]
        self._reads_texts = any(n.cls.reads_texts(n.options) for n in nodes)
        if self._reads_texts and (hidden := [n.id for n in nodes if n.cls.secret]):
            raise ConfigError(
                f"{spec.source}: {hidden[0]} encrypts KV, and text that is found anywhere is kept "
                "with its token ids in plain: use one of them"
            )
        if self._reads_texts and spec.chunk.keys == "sglang":
            raise ConfigError(
                f"{spec.source}: with chunk.keys: sglang a prompt's first link names no tenant, so "
                "nobody knows whose text would be found anywhere: use chunk.keys: own"
            )
        self._spec, self._geometry, self._device = spec, geometry, device
        self._names, self._replica, self._watch = names, replica, watch
        self._facts, self._rotation = facts or ModelFacts(), rotation
        self._process = os.getpid()
        self.changes: deque[Change] = deque()
        self._epoch = secrets.token_bytes(16) if spec.serve is not None else b""
        self._memory = frozenset(n for n, t in spec.tiers.items() if t.cls.in_arena)
        kept = sum(spec.tiers[n].options.capacity for n in self._memory)
        self.arena = Arena(spec.budget.arena, kept)
        if device != "cpu":
            try:
                self.arena.pin(device)
            except BaseException:
                self.arena.close()
                raise
        self.tiers: dict[str, CircuitBreaker] = {}
        self._texts = self._new_texts()
        turning = self._texts is not None and rotation is not None
        warm_up(device, geometry.dtype if turning else "")
        self.runners: dict[str, GraphRunner] = {}
        self.measures: Measures | None = None
        self.admin: StoreAdmin | None = None
        """What gives orders to the tiers, once somebody did."""
        self.making_admin = threading.Lock()
        # Two pools: a disk that hangs must not take the threads that copy. One core stays the
        # engine's: copies are bound by memory, and a second thread on two cores adds half to the
        # CPU time of each byte.
        copying = min(spec.budget.threads, max(1, len(os.sched_getaffinity(0)) - 1))
        self._work = Pool(copying, "work")
        self._io = Pool(spec.budget.threads, "io")
        self.announced, self._events = self._new_announced(), self._new_events()
        self._lent: CircuitBreaker | None = None
        self.portal = Portal(self._live)
        self.handoff: Handoff | None = None
        """Its part in hand-offs between engines; None: it has none."""
        self.serving: EngineListener | None = None
        try:
            self.portal.start()
            self._serve()
        except BaseException:
            self.close()
            raise

    def measure(self) -> None:
        """Begin to count what is counted on request alone."""
        if self.measures is None:
            from tierloom.pipeline.run.measures import Measures

            self.measures = Measures(self.tiers)
            for runner in self.runners.values():
                runner.answer = self.measures.answer

    async def clear(self, local: bool) -> tuple[int, list[str]]:
        """Cancel stores under way, then empty the tiers, or the local ones: how many objects
        there were, and the tiers that refused, with their reasons."""
        await self.halt_stores()
        count, refused = 0, []
        for name, tier in self.tiers.items():
            if tier.local or not local:
                cleared = await tier.clear()
                if isinstance(cleared, Lost):
                    refused.append(f"{name} ({cleared.name.lower()})")
                else:
                    count += cleared
        return count, refused

    async def halt_stores(self) -> None:
        """Cancel stores under way, and what is promised to other engines."""
        if self.handoff is not None:
            self.handoff.clear()
        if (stores := self.runners.get("store")) is not None:
            await _cancel(stores)

    def under_way(self) -> dict[str, int]:
        """Requests that are not answered yet, by graph."""
        return {graph: len(runner.open) for graph, runner in self.runners.items()}

    def close(self) -> None:
        """End every request, close the tiers, free the arena."""
        if self._process != os.getpid():  # forked: neither its threads nor its arena are here
            return
        if self.serving is not None:
            self.serving.close()
        self.portal.close()
        if self._events is not None:
            self._events.close()
        self._release()

    async def _live(self, stop: asyncio.Event, ready: Callable[[], None]) -> None:
        """The portal's main. Behind it, however it ends, no request is left unanswered."""
        async with AsyncExitStack() as home:
            noted = self._watch or self._texts or self.announced or self._events or self._spec.serve
            note = self._note if noted else None
            await open_tiers(
                self._spec, self.arena, self._io, self.tiers, home,
                namespace=self._names.digest, note=note, epoch=self._epoch,
            )  # fmt: skip
            await self._open_lent(home)
            for name, tier in self.tiers.items():
                tier.unread.watch = partial(note, name) if note and tier.local else None
            for graph in self._spec.graphs.values():  # a stage may refuse its options or the layout
                self.runners[graph.name] = self._runner(graph)
            if self._spec.serve is not None or self._spec.handoff is not None:
                self.handoff = self._new_handoff()
                home.push_async_callback(self.handoff.close)
            async with anyio.create_task_group() as tasks:
                for runner in self.runners.values():
                    home.callback(runner.close)
                    runner.start(tasks)
                if self._texts is not None:
                    tasks.start_soon(self._texts.read_headers, self._note)
                ready()
                await stop.wait()
                await self._drain()
                tasks.cancel_scope.cancel()

    def _note(self, tier: str, kept: bool, links: bytes, text: Text | None = None) -> None:
        if self._texts is not None:
            self._texts.note(tier, kept, links, text)
        if (announced := self.announced) is not None:
            announced.note(tier, kept, links)
        if self._events is not None:
            self._events.note(tier, kept, links)
        if kept and self.handoff is not None and self.handoff.promises is not None:
            self.handoff.promises.note(links)
        if not self._watch:
            return
        change = Change(tier, kept, links, text)
        if callable(self._watch):
            self._watch(change)
        else:
            self.changes.append(change)

    def _arriving(self, obj: Object, frames: range) -> None:
        """Frames of an object that is being stored: others may wait for them."""
        if self.handoff is not None and self.handoff.promises is not None:
            self.handoff.promises.note_frames(obj, frames)

    def _serve(self) -> None:
        """Let other engines read what this one keeps, where the file says so."""
        if (options := self._spec.serve) is None:
            return
        from tierloom.pipeline.serve.engine_listener import EngineListener
        from tierloom.pipeline.serve.own_tiers import OwnTiers

        served = [self.tiers[name] for name in options.tiers]
        store = OwnTiers(served, self.arena, self._names.digest, self.portal, self._lent)
        store.handoff = self.handoff
        self.serving = EngineListener(options, store, self._epoch, self.announced)
        self.serving.start()
        if self.handoff is not None and self.serving.address:
            self.handoff.listens_at(self.serving.address)
        if not self.serving.address:  # nobody can be told of it
            self.announced = None

    async def _open_lent(self, home: AsyncExitStack) -> None:
        """Room for what other engines put here, where the file lends it."""
        if (options := self._spec.serve) is None or not options.lend:
            return
        from tierloom.stages.tiers.memory.lent import LENT, Lent

        note = partial(self.announced.note, LENT) if self.announced is not None else None
        ctx = TierContext(self.arena, self._names.digest, self._io, note)
        self._lent = CircuitBreaker(Lent(options.lend, ctx), LENT, Breaker())
        home.push_async_callback(self._lent.close)
        await self._lent.open()

    def _new_handoff(self) -> Handoff:
        from tierloom.pipeline.handoff.handoff import Handoff
        from tierloom.pipeline.handoff.shares import OwnShare

        own = OwnShare(self._names, self._geometry)
        return Handoff(self._spec, self.tiers, self.arena, own, self.portal, pool=self._work)

    @property
    def object_bytes(self) -> int:
        """Of a whole chunk's object, in memory."""
        chunk = self._spec.chunk
        return object_bytes(self._geometry, chunk.tokens, chunk.grain, chunk.group)

    def _new_announced(self) -> AnnouncedTiers | None:
        """What tells a directory what is served; None: nobody is told, and nothing is imported."""
        options = self._spec.serve
        if options is None or not options.directory:
            return None
        from tierloom.pipeline.serve.announced import AnnouncedTiers

        who = self._names, self._geometry, self._epoch.hex()
        return AnnouncedTiers(options, self._spec, *who)

    def _new_events(self) -> PageEvents | None:
        """What tells routers what comes and goes; None: nothing does, and nothing is imported."""
        options = self._spec.serve
        if options is None or not options.events:
            return None
        from tierloom.pipeline.serve.page_events import PageEvents

        events = PageEvents(options, self._spec)
        events.start()
        return events

    def _new_texts(self) -> KeptTexts | None:
        """What finds kept text anywhere; None: no stage asks for it, and nothing is imported."""
        if not self._reads_texts:
            return None
        from tierloom.stages.directory.text_index import TextIndex

        index = TextIndex(self._spec.chunk.tokens, self._spec.chunk.grain)
        index.warm_up()
        return KeptTexts(index, self.tiers, self.arena)

    def _runner(self, graph: Graph) -> GraphRunner:
        g, chunk = self._geometry, self._spec.chunk
        ctx = Context(
            graph=graph.name, chunk=chunk, geometry=g, device=self._device,
            namespace=self._names.digest, names=self._names, facts=self._facts,
            replica=self._replica, rotation=self._rotation,
            texts=self._texts.index if self._texts else None,
            arriving=self._arriving if self._spec.serve is not None else None,
            trusted=self._memory if self._spec.verify == "remote" else frozenset(),
            arena=self.arena, tiers=self.tiers, pool=self._work,
        )  # fmt: skip
        stages: dict[str, Stage] = {n.id: n.cls(n.options, ctx) for n in graph.nodes}
        return GraphRunner(
            graph, lower(graph), stages, pool=self._work, arena=self.arena, in_arena=self._memory,
            object_bytes=self.object_bytes,
            frames=-(-g.layers // chunk.group), inflight=self._spec.budget.inflight,
        )  # fmt: skip

    async def _drain(self, seconds: float = 5.0) -> None:
        """Cancel what is open, and wait until it has ended."""
        async with anyio.create_task_group() as tasks:
            for runner in self.runners.values():
                tasks.start_soon(_cancel, runner, seconds)

    def _release(self) -> None:
        self._work.close()
        self._io.close()
        self.arena.retire()


async def _cancel(runner: GraphRunner, seconds: float = 5.0) -> None:
    """Cancel what is open now, and wait until it has ended."""
    requests = list(runner.open)
    for request in requests:
        request.expire(Lost.CANCELLED)
        runner.poke(request)
    if requests:
        await asyncio.wait([asyncio.wrap_future(r.future) for r in requests], timeout=seconds)
