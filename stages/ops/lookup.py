"""lookup: which chunks of a prompt are kept, and in which tier.

    plan:  {use: lookup, tiers: [hot, warm], want: prefix, worth: auto}
    fresh: {use: lookup, want: absent}

`prefix` plans the longest kept prefix, down to the grain at which the prompt differs from what is
kept. `absent` keeps the chunks that at least one tier lacks. `anywhere` plans the prefix, and for
those who ask for a blend text behind it that was captured elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import anyio

from tierloom.stages.contract.chunks import Chunk, Source
from tierloom.stages.contract.request import Request
from tierloom.stages.contract.stage import Context, RequestStage
from tierloom.stages.errors import ConfigError, Lost
from tierloom.stages.kv.object import LINK
from tierloom.stages.ops.in_turns import mark_in_turns
from tierloom.stages.ops.load_or_recompute import worth_loading
from tierloom.stages.passages.anywhere import plan_excerpts
from tierloom.stages.passages.fresh import fresh_chunks
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker

Tiers = dict[str, CircuitBreaker]
Answers = dict[str, dict[int, bool]]
"""By remote tier and a chunk's index: whether it has that. What is not in it was not asked."""

_SLICE = 16
"""Chunks looked up between two turns of the loop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LookupOptions:
    """What to look for, and where."""

    want: Literal["prefix", "absent", "anywhere"] = "prefix"
    """`prefix`: chunks to load; `anywhere`: text that was captured elsewhere, too; `absent`: chunks
    to store."""
    by: Literal["name", "content"] = "name"
    """`content`: store token ids with chunks, by which they are found anywhere, and leave out text
    that is kept already, whatever it followed."""
    least: int = 64
    """`anywhere`: tokens below which a run of text is computed."""
    tiers: list[str] | None = None
    """Tiers to ask, best first. Default: all of them."""
    worth: Literal["auto", "always", "never"] = "auto"
    """Load only what is quicker to load than to compute: `auto` decides once both are measured."""

    def __post_init__(self) -> None:
        if self.by == "content" and self.want != "absent":
            raise ValueError("by: content is for want: absent, which stores")
        if self.least < 1:
            raise ValueError(f"least must be at least 1, got {self.least}")


class Lookup(RequestStage):
    """Plans a request against the tiers' indexes; remote tiers are asked once, in one batch."""

    Options = LookupOptions
    takes = "keys@host/request"
    gives = "plan@host/request"
    tier_options = ("tiers",)

    def __init__(self, options: LookupOptions, ctx: Context) -> None:
        super().__init__(options, ctx)
        self.names = options.tiers or list(ctx.tiers)
        if self.reads_texts(options) and ctx.geometry.native:
            raise ConfigError(
                "text is found by tokens, native order keeps blocks: order: canonical"
            )

    @classmethod
    def reads_texts(cls, options: LookupOptions) -> bool:
        return options.want == "anywhere" or options.by == "content"

    async def plan(self, request: Request) -> None:
        if request.held:
            self._take_held(request)
            return
        absent = self.options.want == "absent"
        all_of_them = {n: self.ctx.tiers[n] for n in self.names}
        tiers = {n: t for n, t in all_of_them.items() if (t.takes if absent else t.available)}
        if self.options.by == "content":
            request.chunks = await self.ctx.pool(fresh_chunks, request, self.ctx, leases=())
        elif request.exact < 1 << 62:  # what follows must not be found by its name
            request.chunks = [c for c in request.chunks if c.start + c.tokens <= request.exact]
        if absent:
            tiers = {n: t for n, t in tiers.items() if not t.read_only}
        if absent and self.ctx.replica:  # another process puts the same bytes where both can read
            tiers = {n: t for n, t in tiers.items() if t.local}
        known = await self._ask_remote(tiers, request.chunks, absent)
        if absent:
            await self._absent(request, tiers, known)
        elif self.options.worth == "never":
            request.chunks = []
        else:
            await self._prefix(request, tiers, known)
            if self.options.want == "anywhere" and request.blend is not None:
                plan = plan_excerpts, request, self.ctx, tiers, self.options.least
                request.chunks += await self.ctx.pool(*plan, leases=())
            keys = [c.source.key for c in request.chunks if c.source is not None]
            for tier in tiers.values():
                if tier.local:
                    await mark_in_turns(tier.touch, keys)

    def peek(self, request: Request) -> None:
        tiers = {n: t for n in self.names if (t := self.ctx.tiers[n]).local and t.available}
        request.chunks = list(self._longest_prefix(request, tiers, {}))

    async def _ask_remote(self, tiers: Tiers, chunks: list[Chunk], absent: bool) -> Answers:
        """What others have, by chunk. Of what lies in memory only a store asks: a load waits for
        nobody whom it does not need. Who is asked one by one is searched for a prefix then."""
        remote = {n: t for n, t in tiers.items() if not t.local}
        here = [] if absent else [t for t in tiers.values() if t.in_arena]
        searched = set() if absent else {n for n, t in remote.items() if t.one_by_one}
        disks = [t for t in tiers.values() if searched and t.local and not t.in_arena]
        asked, elsewhere = [], set()
        for chunk in chunks if remote else ():
            if not any(_has(tier, chunk.key) for tier in here):
                asked.append(chunk)
                if any(_has(tier, chunk.key) for tier in disks):
                    elsewhere.add(chunk.index)
            if chunk.index % _SLICE == _SLICE - 1:
                await anyio.lowlevel.checkpoint()
        keys = [c.key for c in asked]
        known: Answers = {name: {} for name in remote}

        async def ask(name: str, tier: CircuitBreaker) -> None:
            if name in searched:
                known[name] = await _searched(tier, asked, elsewhere)
                return
            answers = await tier.exists(keys)
            known[name] = {c.index: there for c, there in zip(asked, answers, strict=True)}

        if keys:
            async with anyio.create_task_group() as tg:
                for name, tier in remote.items():
                    tg.start_soon(ask, name, tier)
        return known

    async def _absent(self, request: Request, tiers: Tiers, known: Answers) -> None:
        if not tiers and not self.ctx.replica:
            refusals = (self.ctx.tiers[n].refusal for n in self.names)
            why = next(filter(None, refusals), Lost.TIER_DOWN)
            request.tally(why, len(request.chunks))
            request.chunks = []
            return
        missing = []
        for chunk in request.chunks:
            for name, tier in tiers.items():
                if tier.local:
                    kept = tier.find(chunk.key) is not None  # its last link: the whole chunk
                else:
                    kept = known[name].get(chunk.index, False)
                if not kept:
                    chunk.missing_in.append(name)
            if not chunk.missing_in:
                request.kept_already += chunk.tokens
            elif request.spare <= chunk.start or self._head(chunk, request.spare, tiers):
                missing.append(chunk)
            else:
                request.tally(Lost.ABSENT)
            if chunk.index % _SLICE == _SLICE - 1:
                await anyio.lowlevel.checkpoint()
        request.chunks = missing

    def _take_held(self, request: Request) -> None:
        """The plan of a request whose caller holds the objects of all its chunks, in memory."""
        memory = next(name for name, tier in self.ctx.tiers.items() if tier.in_arena)
        for chunk in request.chunks:
            chunk.object = request.held[chunk.key]
            chunk.source = Source(chunk.key, chunk.tokens, [])
            chunk.took = {memory}

    def _head(self, chunk: Chunk, spare: int, tiers: Tiers) -> bool:
        """Plan where the tokens of a chunk that the caller does not have are to be read; False:
        nowhere."""
        tokens = spare - chunk.start
        if tokens >= chunk.tokens or tokens % self.ctx.chunk.grain:
            return False
        wanted = chunk.links[: tokens // self.ctx.chunk.grain * LINK]
        for name, tier in tiers.items():
            found = tier.find(wanted) if tier.local else None
            if found is not None and found.grains * LINK == len(wanted):
                chunk.source = Source(found.key, tokens, [name])
                return True
        return False

    async def _prefix(self, request: Request, tiers: Tiers, known: Answers) -> None:
        plan = []
        for chunk in self._longest_prefix(request, tiers, known):
            plan.append(chunk)
            if chunk.index % _SLICE == _SLICE - 1:
                await anyio.lowlevel.checkpoint()
        request.chunks = self._worth_loading(request, plan)

    def _longest_prefix(self, request: Request, tiers: Tiers, known: Answers) -> Iterator[Chunk]:
        """The chunks that are kept from the first one on, each with its source; the last one may be
        kept in part."""
        for chunk in request.chunks:
            chunk.source = self._source(request, chunk, tiers, known)
            if chunk.source is not None:
                yield chunk
            if chunk.wanted < chunk.tokens:
                return

    def _source(
        self, request: Request, chunk: Chunk, tiers: Tiers, known: Answers
    ) -> Source | None:
        """What serves most of a chunk, first tier first."""
        best: Source | None = None
        wanted = chunk.tokens
        if request.span is not None and request.span.wanted:
            wanted = min(wanted, max(0, request.span.wanted - chunk.start))
        for name, tier in tiers.items():
            if tier.local:
                found = tier.find(chunk.links)
                if found is None:
                    continue
                key = found.key
                tokens = chunk.tokens if key == chunk.key else found.grains * self.ctx.chunk.grain
            elif known and known[name].get(chunk.index):
                key, tokens = chunk.key, chunk.tokens
            else:
                continue
            if key in tier.unread:
                continue
            tokens = min(tokens, wanted)
            if self.ctx.geometry.native:
                tokens -= tokens % self.ctx.geometry.block_tokens
            if tokens > (best.tokens if best is not None else 0):
                best = Source(key, tokens, [name])
            elif best is not None and (tokens, key) == (best.tokens, best.key):
                best.tiers.append(name)
        return best

    def _worth_loading(self, request: Request, plan: list[Chunk]) -> list[Chunk]:
        """The prefix of `plan` whose loading plus the computing of the rest ends soonest."""
        if self.options.worth == "always" or not request.prefill_rate:
            return plan
        g, costs = self.ctx.geometry, []
        for chunk in plan:
            assert chunk.source is not None
            tier = self.ctx.tiers[chunk.source.tiers[0]]
            costs.append((chunk.wanted, tier.cost(g.frame_bytes(g.layers, chunk.wanted)) or 0.0))
        return plan[: worth_loading(costs, len(request.tokens), request.prefill_rate)]


async def _searched(
    tier: CircuitBreaker, chunks: list[Chunk], elsewhere: set[int]
) -> dict[int, bool]:
    """Which chunks a tier that is asked one by one has, if it has all of them from the first one on
    that it has at all. It is not asked for what it need not have, as others do (`elsewhere`)."""
    needed = [c for c in chunks if c.index not in elsewhere and c.key not in tier.unread]
    count = await tier.prefix_length([c.key for c in needed]) if needed else 0
    end = needed[count].index if count < len(needed) else 1 << 62
    return {c.index: c.index < end for c in chunks}


def _has(tier: CircuitBreaker, key: bytes) -> bool:
    """The whole of a chunk, of a local tier."""
    found = tier.find(key)
    return found is not None and found.key == key and key not in tier.unread
