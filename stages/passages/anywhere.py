"""Chunks of a retrieve that were captured elsewhere, and what must be true of their objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tierloom.stages.blend.policies import Patchwork
from tierloom.stages.contract.chunks import Chunk, Source
from tierloom.stages.contract.request import Request
from tierloom.stages.contract.stage import Context
from tierloom.stages.errors import Lost
from tierloom.stages.kv.object import Header
from tierloom.stages.kv.text import Excerpt, Run
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker


def plan_excerpts(
    request: Request, ctx: Context, tiers: Mapping[str, CircuitBreaker], least: int
) -> list[Chunk]:
    """Chunks for text behind the exact prefix (`request.chunks`) that is kept anywhere in `tiers`;
    `request.blend.work` says which. None where nothing of `least` tokens is found. Runs count
    tokens from the prompt's first, chunks and `work` from the request's."""
    blended, exact = request.blend, sum(c.wanted for c in request.chunks)
    if blended is None or ctx.rotation is None or not len(request.tokens):
        return []
    if not request.root:  # whose text it is, is not known
        return []
    runs: Sequence[Run] = blended.asked or ()
    if blended.asked is None and ctx.texts is not None:
        before = request.chunks[-1].key if request.chunks else b""
        found = ctx.texts.find(
            request.tokens, request.root, start=exact, least=least, opening=request.opening,
            before=before,
        )  # fmt: skip
        runs = [_moved(run, request.first) for run in found]
    kept: list[Run] = []
    chunks: list[Chunk] = []
    for run in runs:
        held = [(e, _holders(e, tiers)) for e in run.excerpts]
        parts = _parts(run, [bool(names) for _, names in held])
        kept += [_moved(part, -request.first) for part in parts]
        for excerpt, names in held:
            if names:
                source = Source(excerpt.key, excerpt.tokens, names, excerpt)
                index = len(request.chunks) + len(chunks)
                place = excerpt.start - request.first, excerpt.tokens
                chunks.append(Chunk(index, *place, excerpt.key, b"", excerpt.start, source=source))
    if sum(c.tokens for c in chunks) < least:
        return []
    blended.work = Patchwork(len(request.tokens), exact, kept)
    return chunks


def why_foreign(request: Request, chunk: Chunk, header: Header) -> Lost | None:
    """Why an object is not what an excerpt takes it for: a fingerprint that two texts share, or
    another text put under the key meanwhile. Token by token."""
    text, excerpt = header.text, chunk.excerpt
    assert excerpt is not None
    if text is None or text.root != request.root:
        return Lost.ABSENT
    ids = text.ids[excerpt.first : excerpt.first + excerpt.tokens]
    same = np.array_equal(ids, request.tokens[chunk.start : chunk.start + chunk.tokens])
    return None if same and text.position + excerpt.first == excerpt.position else Lost.ABSENT


def extend(request: Request, chunk: Chunk, header: Header) -> None:
    """An excerpt was found by whole grains, and its object has come: take what of the text before
    and behind it is the prompt's as well, up to the chunk's ends and to other excerpts."""
    blended, text = request.blend, header.text
    if blended is None or blended.work is None or request.layered or text is None:
        return
    with request.changing:
        excerpt, start, end = chunk.excerpt, chunk.start, chunk.start + chunk.tokens
        if blended.fixed or excerpt is None:
            return
        before = max((c.start + c.wanted for c in request.chunks if c.start < start), default=0)
        after = min((c.start for c in request.chunks if c.start > start), default=1 << 62)
        last = excerpt.first + excerpt.tokens
        ids = request.tokens[: len(request.memory.slots)]
        back = _alike(text.ids[: excerpt.first][::-1], ids[before:start][::-1])
        on = _alike(text.ids[last:], ids[end:after])
        if not back + on:
            return
        grown = excerpt._replace(
            start=excerpt.start - back, tokens=excerpt.tokens + back + on,
            first=excerpt.first - back, position=excerpt.position - back,
        )  # fmt: skip
        chunk.start, chunk.tokens, chunk.position = start - back, grown.tokens, grown.start
        assert chunk.source is not None
        chunk.source.tokens, chunk.source.excerpt = grown.tokens, grown
        here = grown._replace(start=chunk.start)
        runs = [
            run._replace(excerpts=tuple(here if e.start == start else e for e in run.excerpts))
            for run in blended.work.runs
        ]
        blended.work = blended.work._replace(runs=runs)


def _alike(a: npt.NDArray[np.int32], b: npt.NDArray[np.int32]) -> int:
    """How many of the first tokens are the same."""
    n = min(len(a), len(b))
    other = np.flatnonzero(a[:n] != b[:n])
    return int(other[0]) if len(other) else n


def _moved(run: Run, by: int) -> Run:
    """The same run where tokens are counted from another one on."""
    if not by:
        return run
    return run._replace(excerpts=tuple(e._replace(start=e.start + by) for e in run.excerpts))


def _holders(excerpt: Excerpt, tiers: Mapping[str, CircuitBreaker]) -> list[str]:
    """Local tiers that have an excerpt's object, best first."""
    names = []
    for name, tier in tiers.items():
        found = tier.find(excerpt.key) if tier.local and excerpt.key not in tier.unread else None
        if found is not None and found.key == excerpt.key:
            names.append(name)
    return names


def _parts(run: Run, there: list[bool]) -> list[Run]:
    """What is left of a run when some of its objects are gone. What stands behind a gap follows
    its own text, computed: no seam."""
    parts: list[Run] = []
    begins = True
    for excerpt, kept in zip(run.excerpts, there, strict=True):
        if kept and begins:
            parts.append(Run((excerpt,), run.seam and excerpt is run.excerpts[0]))
        elif kept:
            parts[-1] = parts[-1]._replace(excerpts=(*parts[-1].excerpts, excerpt))
        begins = not kept
    return parts
