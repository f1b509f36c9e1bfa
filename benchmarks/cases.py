"""What is measured: models' shapes, an engine of plain tensors, prompts, and pipelines over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import tierloom
from tierloom import KVLayout, Pipeline

if TYPE_CHECKING:
    from collections.abc import Mapping

BLOCK, CHUNK, ITEMSIZE = 16, 256, 2


@dataclass(frozen=True)
class Shape:
    """A model's KV, in bfloat16."""

    layers: int
    heads: int
    dim: int
    group: int
    """Layers of a frame."""

    def nbytes(self, tokens: int) -> int:
        return 2 * self.layers * self.heads * self.dim * ITEMSIZE * tokens

    def objects(self, tokens: int) -> int:
        """Bytes of as many tokens in a tier, headers included."""
        return self.nbytes(tokens) + -(-tokens // CHUNK) * 4096


SHAPES = {
    "8B": Shape(32, 8, 128, group=4),  # Llama-3.1-8B: 32 MiB per chunk
    "SmolLM2": Shape(30, 3, 64, group=5),  # SmolLM2-135M: 5.6 MiB per chunk
}
TINY, TINY_CHUNK = Shape(8, 1, 32, group=1), {"tokens": 64, "grain": 8, "group": 1}
"""Chunks of 8 frames and 8 grains, as Llama's, whose bytes cost next to nothing."""


class Engine:
    """A paged cache of noise: `source` blocks, and as many others to bring the KV back to.

    Both are shuffled, so that no two blocks of a prompt follow one another.
    """

    def __init__(self, shape: Shape, tokens: int, seed: int = 0) -> None:
        self.shape, self.tokens = shape, tokens
        self._rng = np.random.default_rng(seed)
        count = -(-tokens // BLOCK)
        blocks = 2 * count + 8
        size = (2, blocks, BLOCK, shape.heads, shape.dim)
        self.caches = [self._noise(size) for _ in range(shape.layers)]
        order = self._rng.permutation(blocks)
        self._source, self._target = order[:count], order[count : 2 * count]
        self.source, self.target = slots(self._source)[:tokens], slots(self._target)[:tokens]
        self.layout = KVLayout.from_tensors(self.caches, order="2BNHD", block_tokens=BLOCK)

    @property
    def nbytes(self) -> int:
        return self.shape.nbytes(self.tokens)

    def prompt(self) -> np.ndarray:
        """Tokens that were never asked for before."""
        return self._rng.integers(0, 128_000, self.tokens).astype(np.int32)

    def blank(self) -> None:
        """Forget what was brought back."""
        for cache in self.caches:
            cache.view(torch.int16)[:, self._target] = -1

    def same(self) -> bool:
        """Whether every byte that was brought back is the one that was stored."""
        views = (cache.view(torch.int16) for cache in self.caches)
        return all(torch.equal(v[:, self._source], v[:, self._target]) for v in views)

    def _noise(self, size: tuple[int, ...]) -> torch.Tensor:
        words = self._rng.integers(0, 1 << 63, int(np.prod(size)) // 4, dtype=np.int64)
        return torch.from_numpy(words.view(np.int16)).view(torch.bfloat16).reshape(size)


def slots(blocks: np.ndarray) -> np.ndarray:
    return (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel().astype(np.int64)


def write_through(tiers: Mapping[str, Mapping[str, Any]], **top: Any) -> dict[str, Any]:
    """A pipeline that puts every chunk into all of `tiers` and drops nothing; read from the first
    that has it. Time limits are far off: a slow machine is a bad figure, not a miss."""
    puts = {f"put_{t}": {"use": "put", "tier": t, "when_full": "block"} for t in tiers}
    memory = [name for name, tier in tiers.items() if tier["use"] == "memory"]
    fetch = {"use": "get", "promote": memory[0]} if memory and len(tiers) > 1 else {"use": "get"}
    return {
        "version": 1,
        "name": "bench",
        "tiers": {name: {**tier, "timeout": "60 s"} for name, tier in tiers.items()},
        "graphs": {
            "store": {
                "deadline": "60 s",
                "stages": {
                    "keys": {"use": "hash"},
                    "fresh": {"use": "lookup", "want": "absent"},
                    "pack": {"use": "gather"},
                    **puts,
                },
            },
            "retrieve": {
                "deadline": "60 s",
                "stages": {
                    "keys": {"use": "hash"},
                    "plan": {"use": "lookup", "want": "prefix"},
                    "fetch": fetch,
                    "grow": {"use": "decode"},
                    "place": {"use": "scatter"},
                },
            },
        },
        **top,
    }


def chunking(shape: Shape) -> dict[str, int]:
    return {"tokens": CHUNK, "grain": 32, "group": shape.group}


def opened(engine: Engine, tiers: Mapping[str, Mapping[str, Any]], **top: Any) -> Pipeline:
    """A pipeline over `engine`, with a GiB of arena for what is under way."""
    top = {"budget": {"arena": "1 GiB"}, "chunk": chunking(engine.shape)} | top
    return tierloom.open(write_through(tiers, **top), layout=engine.layout, model="bench")


def clear(pipe: Pipeline, tier: str) -> None:
    """Empty one tier, so that the next one is read."""
    pipe._portal.call(pipe.tiers[tier].clear)
