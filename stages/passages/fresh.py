"""Chunks of a store with their text: what is kept already, behind whatever, is not kept again."""

from __future__ import annotations

from hashlib import sha256

import numpy as np

from tierloom.stages.blend.policies import stretches
from tierloom.stages.contract.chunks import Chunk
from tierloom.stages.contract.request import Request
from tierloom.stages.contract.stage import Context
from tierloom.stages.kv.namespace import tlv
from tierloom.stages.kv.text import OPENING, Text


def fresh_chunks(request: Request, ctx: Context) -> list[Chunk]:
    """A request's chunks, each with its text, without those of which fewer than 64 tokens are new.

    From `request.exact` on, KV was computed over text that stood elsewhere. Nothing of that may be
    found by those who ask for a prefix: new text of at least 64 tokens is kept under keys of its
    own. All chunks as they are where the caller has not said its tokens, or whose they are.
    """
    tokens, exact = request.tokens, request.exact
    if ctx.texts is None or not len(tokens) or not request.root:
        return [c for c in request.chunks if c.start + c.tokens <= exact]
    new = np.ones(len(tokens), np.bool_)
    for run in ctx.texts.find(tokens, request.root, least=ctx.chunk.grain, opening=request.opening):
        new[run.start : run.end] = False
    chunks = []
    for chunk in request.chunks:
        end = chunk.start + chunk.tokens
        if end > exact:
            break
        chunk.text = _text(request, chunk.start, end, chunk.parent)
        if chunk.key in ctx.texts or new[chunk.start : end].sum() >= min(OPENING, chunk.tokens):
            chunks.append(chunk)
        else:
            request.kept_already += chunk.tokens
    if exact < len(tokens):
        new[:exact] = False
        chunks += _by_content(request, ctx, new)
    for i, chunk in enumerate(chunks):
        chunk.index = i
    return chunks


def content_key(root: bytes, tokens: bytes) -> bytes:
    """The key of text that stands nowhere: only an index of texts finds it."""
    return sha256(tlv(("content", root), ("tokens", tokens))).digest()


def _by_content(request: Request, ctx: Context, new: np.ndarray) -> list[Chunk]:
    """New text in chunks of its own, each the child of the one before it in its stretch."""
    chunks: list[Chunk] = []
    for a, b in stretches(new):
        parent = request.root
        for start in range(a, b if b - a >= OPENING else a, ctx.chunk.tokens):
            end = min(b, start + ctx.chunk.tokens)
            text = _text(request, start, end, parent)
            key = content_key(request.root, text.ids.tobytes())
            chunks.append(Chunk(0, start, end - start, key, parent, text.position, text=text))
            parent = key
    return chunks


def _text(request: Request, start: int, end: int, parent: bytes) -> Text:
    ids = np.ascontiguousarray(request.tokens[start:end])
    return Text(ids, request.first + start, request.root, parent, request.opening)
