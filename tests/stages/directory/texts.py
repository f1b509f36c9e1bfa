"""Prompts as a store keeps them, and what of them must be found: by brute force."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tierloom.stages.directory.text_index import TextIndex
from tierloom.stages.kv.text import OPENING, Run, Text

Tokens = npt.NDArray[np.int32]
ROOT, OTHER = b"r" * 32, b"o" * 32


def link(before: bytes, tokens: Tokens) -> bytes:
    return hashlib.sha256(before + tokens.tobytes()).digest()


def opening_of(prompt: Tokens, root: bytes = ROOT) -> bytes:
    return link(root, prompt[:OPENING]) if len(prompt) >= OPENING else root


def chunks_of(prompt: Tokens, chunk: int, root: bytes = ROOT) -> Iterator[tuple[bytes, Text]]:
    parent, opening = root, opening_of(prompt, root)
    for at in range(0, len(prompt), chunk):
        ids = np.ascontiguousarray(prompt[at : at + chunk], np.int32)
        key = link(parent, ids)
        yield key, Text(ids, at, root, parent, opening)
        parent = key


class Shelf:
    """An index, and beside it the text of what is in it."""

    def __init__(self, chunk: int = 256, grain: int = 32, base: int | None = None) -> None:
        self.chunk, self.grain = chunk, grain
        self.index = TextIndex(chunk, grain, base=base)
        self.texts: dict[bytes, Text] = {}

    def keep(self, prompt: Tokens, root: bytes = ROOT) -> list[bytes]:
        keys = []
        for key, text in chunks_of(prompt, self.chunk, root):
            self.index.add(key, text)
            if len(text.ids) >= self.grain:
                self.texts.setdefault(key, text)
            keys.append(key)
        return keys

    def drop(self, key: bytes) -> None:
        self.index.remove(key)
        self.texts.pop(key, None)

    def kept(self, prompt: Tokens, start: int = 0, root: bytes = ROOT) -> list[bool]:
        """By offset: a kept grain of this root begins there."""
        grains = {
            text.ids[g : g + self.grain].tobytes()
            for text in self.texts.values()
            for g in range(0, len(text.ids) - self.grain + 1, self.grain)
            if text.root == root
        }
        last = len(prompt) - self.grain
        return [p <= last and p >= start and prompt[p : p + self.grain].tobytes() in grains
                for p in range(len(prompt))]  # fmt: skip

    def check(self, prompt: Tokens, runs: list[Run], start: int = 0, least: int = 64) -> int:
        """Runs are what their excerpts say, token by token; returns tokens found."""
        end = start
        for run in runs:
            assert run.start >= end
            assert run.end - run.start >= least
            at, before = run.start, None
            for e in run.excerpts:
                text = self.texts[e.key]
                assert e.start == at
                assert e.first % self.grain == e.tokens % self.grain == 0
                assert e.position == text.position + e.first
                assert (prompt[e.start : e.end] == text.ids[e.first : e.first + e.tokens]).all()
                if before is not None:
                    last = self.texts[before.key]
                    assert before.first + before.tokens == len(last.ids)
                    assert (e.first, text.parent) == (0, before.key)
                    assert e.position == before.position + before.tokens
                at, before = e.end, e
            end = run.end
        return sum(run.end - run.start for run in runs)


def most_tokens(shelf: Shelf, prompt: Tokens, least: int) -> int:
    """The best sum of run lengths, each less `least` - 1: every way tried, the slow way."""
    grain, n = shelf.grain, len(prompt)
    spans: list[list[int]] = [[] for _ in range(n + 1)]
    children: dict[bytes, list[bytes]] = {}
    for key, text in shelf.texts.items():
        children.setdefault(text.parent, []).append(key)

    def reach(p: int, key: bytes, first: int) -> set[int]:
        text, ends = shelf.texts[key], set()
        while first + grain <= len(text.ids) and p + grain <= n:
            if (prompt[p : p + grain] != text.ids[first : first + grain]).any():
                return ends
            p, first = p + grain, first + grain
            ends.add(p)
        if first == len(text.ids):
            for child in children.get(key, []):
                ends |= reach(p, child, 0)
        return ends

    for p in range(n):
        for key, text in shelf.texts.items():
            for first in range(0, len(text.ids) - grain + 1, grain):
                spans[p] += [e for e in reach(p, key, first) if e - p >= least]
    best = [0] * (n + 1)
    for p in range(n - 1, -1, -1):
        best[p] = max([best[p + 1], *(e - p - least + 1 + best[e] for e in spans[p])])
    return best[0]
