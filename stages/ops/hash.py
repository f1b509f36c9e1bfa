"""hash: tokens to the chain of grain links, and chunks named by them.

keys: {use: hash}
"""

from __future__ import annotations

from tierloom.stages.contract.chunks import Chunk
from tierloom.stages.contract.request import Request
from tierloom.stages.contract.stage import RequestStage
from tierloom.stages.kv.object import LINK
from tierloom.stages.kv.prefix import Span, grain_links
from tierloom.stages.kv.text import OPENING
from tierloom.stages.options import NoOptions

_SHORT = 1024
"""Tokens that are hashed in less time than another thread takes to begin."""


class Hash(RequestStage):
    """Names a request's chunks, as `chunk:` and the namespace say."""

    Options = NoOptions
    takes = "tokens@host/request"
    gives = "keys@host/request"

    def is_quick(self, item: Request) -> bool:
        return item.span is None and len(item.tokens) <= _SHORT

    def plan(self, request: Request) -> None:
        c, span = self.ctx.chunk, request.span
        if span is None:
            tokens = request.tokens
            if self.ctx.geometry.native:  # a started block cannot be kept as a block
                block = self.ctx.geometry.block_tokens
                tokens = tokens[: len(tokens) // block * block]
            links = b"".join(grain_links(request.seed, tokens, c.grain))
            span = Span(links, request.seed, len(tokens), start=0)
            opening = -(-OPENING // c.grain) * LINK
            request.opening = (
                links[opening - LINK : opening] if len(links) >= opening else span.parent
            )
        request.chunks = chunks_of(span, size=c.tokens, grain=c.grain, partial=c.partial)


def chunks_of(span: Span, *, size: int, grain: int, partial: bool) -> list[Chunk]:
    """Split a named prompt into chunks of `size` tokens; a shorter last one only if `partial`."""
    tokens = span.tokens if partial else span.tokens // size * size
    links, step = span.links, size // grain * LINK
    return [
        Chunk(
            index=i,
            start=i * size,
            tokens=min(size, tokens - i * size),
            links=links[i * step : (i + 1) * step],
            parent=links[i * step - LINK : i * step] if i else span.parent,
            position=span.start + i * size if span.start >= 0 else -1,
        )
        for i in range(-(-tokens // size))
    ]
