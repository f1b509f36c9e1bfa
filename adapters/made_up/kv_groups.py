"""The KV that an engine without a model has, as a user writes its shape.

    (2,2,256,4,16):float16:2;(1,8,64,1,576):bfloat16:4

Each group: K and V (2), or 1 for a latent (MLA); blocks; tokens of a block; KV heads; channels of a
head; then the dtype, and how many layers. It is the form of LMCache's `--kvcache-shape-spec`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from tierloom.pipeline.config.problems import nearest
from tierloom.stages.errors import ConfigError
from tierloom.stages.kv.geometry import DTYPES

OPTION = "--kvcache-shape-spec"
SHORT = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32",
         "fp32": "float32", "fp8": "float8_e4m3fn"}  # fmt: skip
_GROUP = re.compile(r"\(([^()]*)\)\s*:\s*([\w.]+)\s*:\s*(\d+)")
_FORM = "(2,BLOCKS,TOKENS,HEADS,DIM):DTYPE:LAYERS"


class KVGroup(NamedTuple):
    """Layers whose KV has one shape."""

    kv: int
    """2: K and V; 1: a latent."""
    blocks: int
    block_tokens: int
    heads: int
    dim: int
    dtype: str
    layers: int

    @property
    def tokens(self) -> int:
        """Tokens that its blocks hold."""
        return self.blocks * self.block_tokens

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's KV in all its layers."""
        return self.kv * self.layers * self.heads * self.dim * DTYPES[self.dtype]

    def __str__(self) -> str:
        shape = ",".join(map(str, self[:5]))
        return f"({shape}):{self.dtype}:{self.layers}"


def kv_groups(text: str, *, use_mla: bool = False) -> list[KVGroup]:
    """Read a shape spec; at least one group. `use_mla`: all groups must be latents. Raises
    ConfigError, which names the group and what is wrong with it."""
    return [
        _group(f"{OPTION}, group {i}: {part.strip()!r}", part.strip(), use_mla)
        for i, part in enumerate(text.strip().rstrip(";").split(";"), 1)
    ]


def _group(where: str, text: str, use_mla: bool) -> KVGroup:
    found = _GROUP.fullmatch(text)
    sizes = [word.strip() for word in found[1].rstrip(", ").split(",")] if found else []
    if found is None or len(sizes) != 5 or not all(word.isdecimal() for word in sizes):
        raise ConfigError(f"{where}: write {_FORM}, for example (2,2,256,4,16):float16:2")
    kv, blocks, block_tokens, heads, dim = map(int, sizes)
    dtype, layers = found[2].removeprefix("torch."), int(found[3])
    dtype = SHORT.get(dtype, dtype)
    if dtype not in DTYPES:
        raise ConfigError(f"{where}: dtype {dtype!r} is not kept: {nearest(dtype, DTYPES)}")
    if kv not in (1, 2):
        raise ConfigError(f"{where}: begins with {kv}; 2: K and V, 1: a latent (MLA)")
    if min(blocks, block_tokens, heads, dim, layers) < 1:
        raise ConfigError(f"{where}: every size is at least 1")
    if kv == 1 and heads != 1:
        raise ConfigError(f"{where}: a latent has 1 head, not {heads}: (1,BLOCKS,TOKENS,1,DIM)")
    if use_mla and kv == 2:
        raise ConfigError(f"{where}: with --use-mla a group begins with 1, a latent, not with 2")
    return KVGroup(kv, blocks, block_tokens, heads, dim, dtype, layers)
