"""lookup: which chunks of a prompt are kept, and in which tier.

    plan:  {use: lookup, tiers: [hot, warm], want: prefix, worth: auto}
    fresh: {use: lookup, want: absent}

`prefix` plans the longest kept prefix, down to the grain at which the prompt leaves what is kept.
`absent` keeps the chunks that at least one tier lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import anyio

from tierloom.stages.contract.batch import Piece
from tierloom.stages.contract.request import Ticket
from tierloom.stages.contract.stage import Context, LoopStage
from tierloom.stages.errors import Lost
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker

_SLICE = 16
"""Chunks looked up between two turns of the loop."""


async def in_slices(mark: Callable[[list[bytes]], None], keys: list[bytes]) -> None:
    """`mark` keys, head of the prompt first, tail to head, in turns of the loop."""
    for end in range(len(keys), 0, -64):
        mark(keys[max(0, end - 64) : end])
        await anyio.lowlevel.checkpoint()


@dataclass(frozen=True, kw_only=True, slots=True)
class LookupOptions:
    """What to look for, and where."""

    want: Literal["prefix", "absent"] = "prefix"
    """`prefix`: chunks to load; `absent`: chunks to store."""
    tiers: list[str] | None = None
    """Tiers to ask, best first; all of them when not said."""
    worth: Literal["auto", "always", "never"] = "auto"
    """Load only what is quicker to load than to compute: `auto` decides once both are measured."""


class Lookup(LoopStage):
    """Plans a request against the tiers' indexes; remote tiers are asked once, in one batch."""

    Options = LookupOptions
    takes = "keys@host/request"
    gives = "plan@host/request"
    tier_options = ("tiers",)

    def __init__(self, options: LookupOptions, ctx: Context) -> None:
        super().__init__(options, ctx)
        self.names = options.tiers or list(ctx.tiers)

    async def plan_async(self, ticket: Ticket) -> None:
        tiers = {n: t for n in self.names if (t := self.ctx.tiers[n]).available}
        absent = self.options.want == "absent"
        if absent and self.ctx.replica:  # another process puts the same bytes where both can read
            tiers = {n: t for n, t in tiers.items() if t.local}
        known = await self._ask_remote(tiers, ticket.pieces)
        if absent:
            await self._absent(ticket, tiers, known)
        elif self.options.worth == "never":
            ticket.pieces = []
        else:
            await self._prefix(ticket, tiers, known)

    def peek(self, ticket: Ticket) -> None:
        tiers = {n: t for n in self.names if (t := self.ctx.tiers[n]).local and t.available}
        plan = []
        for piece in ticket.pieces:
            self._serve(ticket, piece, tiers, {})
            if piece.take:
                plan.append(piece)
            if piece.take < piece.tokens:
                break
        ticket.pieces = plan

    async def _ask_remote(
        self, tiers: dict[str, CircuitBreaker], pieces: list[Piece]
    ) -> dict[str, list[bool]]:
        keys = [p.key for p in pieces]
        known: dict[str, list[bool]] = {}

        async def ask(name: str, tier: CircuitBreaker) -> None:
            known[name] = await tier.exists(keys)

        remote = {n: t for n, t in tiers.items() if not t.local}
        if remote and keys:
            async with anyio.create_task_group() as tg:
                for name, tier in remote.items():
                    tg.start_soon(ask, name, tier)
        return known

    async def _absent(
        self, ticket: Ticket, tiers: dict[str, CircuitBreaker], known: dict[str, list[bool]]
    ) -> None:
        if not tiers and not self.ctx.replica:
            ticket.tally(Lost.TIER_DOWN, len(ticket.pieces))
            ticket.pieces = []
            return
        missing = []
        for piece in ticket.pieces:
            for name, tier in tiers.items():
                if tier.local:
                    kept = tier.find(piece.key) is not None  # its last link: the whole chunk
                else:
                    kept = known[name][piece.index]
                if not kept:
                    piece.tiers.append(name)
            if piece.tiers:
                missing.append(piece)
            else:
                ticket.kept_already += piece.tokens
            if piece.index % _SLICE == _SLICE - 1:
                await anyio.lowlevel.checkpoint()
        ticket.pieces = missing

    async def _prefix(
        self, ticket: Ticket, tiers: dict[str, CircuitBreaker], known: dict[str, list[bool]]
    ) -> None:
        plan = []
        for piece in ticket.pieces:
            self._serve(ticket, piece, tiers, known)
            if piece.take:
                plan.append(piece)
            if piece.take < piece.tokens:
                break
            if piece.index % _SLICE == _SLICE - 1:
                await anyio.lowlevel.checkpoint()
        plan = self._worth(ticket, plan)
        keys = [p.source for p in plan]
        for tier in tiers.values():
            if tier.local:
                await in_slices(tier.touch, keys)
        ticket.pieces = plan

    def _serve(
        self,
        ticket: Ticket,
        piece: Piece,
        tiers: dict[str, CircuitBreaker],
        known: dict[str, list[bool]],
    ) -> None:
        """Set `source`, `take` and `tiers` to what serves most of this piece, first tier first."""
        best, wanted = 0, piece.tokens
        if ticket.span is not None and ticket.span.place:
            wanted = min(wanted, max(0, ticket.span.place - piece.start))
        for name, tier in tiers.items():
            if tier.local:
                found = tier.find(piece.links)
                if found is None:
                    continue
                key = found.key
                tokens = piece.tokens if key == piece.key else found.grains * self.ctx.chunk.grain
            elif known and known[name][piece.index]:
                key, tokens = piece.key, piece.tokens
            else:
                continue
            if key in tier.unread:
                continue
            tokens = min(tokens, wanted)
            if self.ctx.geometry.native:
                tokens -= tokens % self.ctx.geometry.block_tokens
            if tokens > best:
                best, piece.source, piece.take, piece.tiers = tokens, key, tokens, [name]
            elif tokens == best and key == piece.source:
                piece.tiers.append(name)

    def _worth(self, ticket: Ticket, plan: list[Piece]) -> list[Piece]:
        """The prefix of `plan` whose loading plus the computing of the rest ends soonest."""
        if self.options.worth == "always" or not ticket.prefill_rate:
            return plan
        g, costs = self.ctx.geometry, []
        for piece in plan:
            cost = self.ctx.tiers[piece.tiers[0]].cost(g.frame_bytes(g.layers, piece.take))
            costs.append((piece.take, cost or 0.0))
        return plan[: worth(costs, len(ticket.tokens), ticket.prefill_rate)]


def worth(costs: Iterable[tuple[int, float]], total: int, rate: float) -> int:
    """How many of these chunks, (tokens, seconds to load them) each, to load for the sooner end.

    The rest of `total` tokens is computed at `rate` tokens/s.
    """
    best, cut, spent, tokens = total / rate, 0, 0.0, 0
    for n, (size, cost) in enumerate(costs, start=1):
        spent += cost
        tokens += size
        ends = spent + (total - tokens) / rate
        if ends <= best:
            best, cut = ends, n
    return cut
