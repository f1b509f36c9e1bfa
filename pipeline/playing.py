"""A pipeline with made-up KV, to try things on: `tierloom.play()`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.config.presets import Source, presets
from tierloom.pipeline.config.problems import nearest
from tierloom.pipeline.config.spec import PipelineSpec
from tierloom.pipeline.pipeline import Pipeline
from tierloom.pipeline.requests import check_keywords
from tierloom.stages.contract.ticket import Ticket
from tierloom.stages.errors import InputError
from tierloom.stages.kv.geometry import Geometry
from tierloom.stages.kv.layout import KVLayout
from tierloom.stages.kv.object import object_bytes

BLOCK = 16
"""Tokens of a block of the made-up cache."""
DTYPE = "bfloat16"


class KVSize(NamedTuple):
    """The KV of a model, for one token."""

    layers: int
    heads: int
    """KV heads; 0: a latent (MLA), of which there is one."""
    dim: int


SHAPES = {
    "deepseek-v3": KVSize(61, 0, 576),
    "llama-3.1-8b": KVSize(32, 8, 128),
    "llama-3.1-70b": KVSize(80, 8, 128),
    "mistral-7b": KVSize(32, 8, 128),
    "qwen2.5-7b": KVSize(28, 4, 128),
    "qwen3-8b": KVSize(36, 8, 128),
    "smollm2-135m": KVSize(30, 3, 64),
}
"""Shapes that `play` knows by name."""


class Playground(Pipeline):
    """A pipeline that has tokens and KV of its own: `store()`, `empty()`, `retrieve()`, `error()`.

    `tokens` int32 [n] are random; `caches` hold one tensor per layer, bfloat16, in blocks of 16
    tokens. All of `Pipeline` is there as well, also with other arguments. Close it: its disk tiers
    lie in a temporary folder, which goes then.
    """

    def __init__(
        self, spec: PipelineSpec, size: KVSize, tokens: int, model: str,
        folder: tempfile.TemporaryDirectory[str], **identity: Any,
    ) -> None:  # fmt: skip
        self._folder = folder
        self.tokens: npt.NDArray[np.int32] = (
            np.random.default_rng(0).integers(0, 32_000, tokens).astype(np.int32)
        )
        self.slots: npt.NDArray[np.int64] = np.arange(tokens)
        inner = (BLOCK, size.heads, size.dim) if size.heads else (BLOCK, size.dim)
        blocks = -(-tokens // BLOCK)
        shape = (2, blocks, *inner) if size.heads else (blocks, *inner)
        self._noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        self.caches = [self._made_up(i) for i in range(size.layers)]
        layout = KVLayout.from_tensors(self.caches, order="2BNHD" if size.heads else "MLA")
        try:
            super().__init__(spec, layout, model=model, **identity)
        except BaseException:
            folder.cleanup()
            raise

    def store(
        self,
        tokens: Any = None,
        caches: Sequence[Any] | None = None,
        slots: Any = None,
        **names: Any,
    ) -> Ticket:
        """As `Pipeline.store`; without arguments all tokens."""
        return super().store(*self._given(tokens, caches, slots, names), **names)

    def retrieve(
        self,
        tokens: Any = None,
        caches: Sequence[Any] | None = None,
        slots: Any = None,
        **names: Any,
    ) -> Ticket:
        """As `Pipeline.retrieve`; without arguments all tokens."""
        return super().retrieve(*self._given(tokens, caches, slots, names), **names)

    def lookup(self, tokens: Any = None, **names: Any) -> int:
        """As `Pipeline.lookup`; without arguments all tokens."""
        return super().lookup(self.tokens if tokens is None else tokens, **names)

    def empty(self) -> None:
        """Zero the caches, so that what is in them next was retrieved."""
        for layer in self.caches:
            layer.zero_()

    def error(self) -> float:
        """How far off the caches are from what was made up: the norm of the difference by the norm
        of the KV. 0.0: every bit is right; about 1.0: nothing came."""
        off = whole = 0.0
        for i, layer in enumerate(self.caches):
            made, came = self._rows(self._made_up(i)), self._rows(layer)
            whole += float(made.float().square().sum())
            if not torch.equal(made.view(torch.int16), came.view(torch.int16)):
                off += float((made.float() - came.float()).square().sum())
        return float((off / whole) ** 0.5)

    def close(self) -> None:
        super().close()
        self._folder.cleanup()

    def _given(
        self, tokens: Any, caches: Sequence[Any] | None, slots: Any, names: Mapping[str, Any]
    ) -> tuple[Any, Sequence[Any], Any]:
        ids = self.tokens if tokens is None else tokens
        if slots is None and names.get("blocks") is None:
            slots = self.slots[: len(ids)]
        return ids, self.caches if caches is None else caches, slots

    def _rows(self, layer: torch.Tensor) -> torch.Tensor:
        """Of the tokens alone: the last block may have more."""
        if self.layout.kv == 2:
            return layer.flatten(1, 2)[:, : len(self.tokens)]
        return layer.flatten(0, 1)[: len(self.tokens)]

    def _made_up(self, layer: int) -> torch.Tensor:
        """Noise with channels that are off, as real KV has; other in each layer."""
        last = self._noise.shape[-1]
        away = torch.randn(last, generator=torch.Generator().manual_seed(layer + 1)).bfloat16()
        return torch.roll(self._noise, 7 * layer + 1, dims=-1).add_(2 * away)


def play(
    preset: Source = "tiered", shape: str | Sequence[int] = "llama-3.1-8b", tokens: int = 4096, *,
    overrides: Mapping[str, Any] | None = None, **identity: Any,
) -> Playground:  # fmt: skip
    """Open a preset (or a file, or a mapping) over made-up KV in this process's memory.

    `shape`: one of `SHAPES`, or (layers, KV heads, channels). Of a preset, unless `overrides` says
    otherwise, memory tiers have room for twice what is stored, folders are temporary ones, and
    deadlines are a minute; files and mappings are followed as they are. 4,096 tokens of
    llama-3.1-8b take 512 MiB, and as much again once stored. Raises InputError for an unknown
    shape, ConfigError, and TierDown where a server is missing.
    """
    name, size = _size(shape)
    check_keywords("play", identity, Pipeline.__init__)
    if tokens < 1:
        raise InputError(f"tokens is {tokens}: at least 1 is needed")
    folder = tempfile.TemporaryDirectory(prefix="tierloom-play-", ignore_cleanup_errors=True)
    try:
        spec = load_config(preset, overrides)
        if preset in presets():
            small = _small(spec, size, tokens, folder.name)
            spec = load_config(preset, {**small, **(overrides or {})})
    except BaseException:
        folder.cleanup()
        raise
    return Playground(spec, size, tokens, f"made-up {name}", folder, **identity)


def _size(shape: str | Sequence[int]) -> tuple[str, KVSize]:
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise InputError(f"shape {shape!r} is unknown: {nearest(shape, SHAPES)}")
        return shape, SHAPES[shape]
    if len(shape) != 3 or min(shape[0], shape[2]) < 1 or shape[1] < 0:
        raise InputError(f"shape {tuple(shape)}: wants (layers, KV heads, channels)")
    return "x".join(map(str, shape)), KVSize(*map(int, shape))


def _small(spec: PipelineSpec, size: KVSize, tokens: int, folder: str) -> dict[str, Any]:
    """Overrides that fit a pipeline to so much KV."""
    made: dict[str, Any] = {}
    chunk = spec.chunk
    geometry = Geometry(2 if size.heads else 1, size.layers, size.heads or 1, size.dim, DTYPE, 1)
    each = object_bytes(geometry, chunk.tokens, chunk.grain, chunk.group)
    room = 2 * each * -(-tokens // chunk.tokens)
    for tier in spec.tiers.values():
        names = {f.name for f in fields(tier.options)}
        if tier.cls.in_arena and "capacity" in names:
            made[f"tiers.{tier.name}.capacity"] = room
        elif "path" in names:
            made[f"tiers.{tier.name}.path"] = f"{folder}/{tier.name}"
            if "segment" in names:  # is written in full when it is begun
                made[f"tiers.{tier.name}.segment"] = max(64 << 20, 4 * each)
    made["budget.arena"] = max(256 << 20, 8 * each)
    for name in spec.graphs:  # a first call compiles, and this machine may be slow
        made[f"graphs.{name}.deadline"] = "60 s"
    return made
