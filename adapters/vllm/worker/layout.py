"""vLLM's KV tensors as layouts: which group can be stored, in which byte order, or why not.

vLLM passes every layer as one logical view [blocks, heads, tokens in block, content], whatever its
physical order; strides show the rest. The attention backend decides how K and V lie inside the
content: if that is unknown, blocks are stored as opaque bytes or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from vllm.v1 import kv_cache_interface as kv

from tierloom.stages.errors import LayoutError
from tierloom.stages.kv.layout import KVLayout
from tierloom.stages.kv.layout_check import fewer, look_alike, memory_of, token

_SIDE_BY_SIDE = {"FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION", "TREE_ATTN"}
"""Backends whose content is K of a token, then V of it."""
_DRAFT = "draft_model."
"""What vLLM's names of a draft model's layers begin with."""
_RESTORED = (kv.FullAttentionSpec, kv.SlidingWindowSpec)
"""Groups that can continue from the KV of a prefix alone; MLA is one of the first."""


class CacheGroup(NamedTuple):
    """One KV group of this worker, which one pipeline stores."""

    number: int
    names: list[str]
    """Layers, in model order."""
    caches: list[torch.Tensor]
    layout: KVLayout
    block_tokens: int
    """Tokens of a block of vLLM's tables."""
    split: int
    """Blocks of the tensors to one of vLLM's tables."""
    backend: str
    """What native bytes depend on besides the layout."""
    opaque: bool
    """K and V cannot be separated: only native order works."""
    part: str
    """Names the group among several; empty when it is the only one."""
    window: bool
    """Blocks that left the sliding window are freed while the request goes on."""


def cache_groups(
    caches: Mapping[str, torch.Tensor], config: Any, layers: Mapping[str, Any]
) -> list[CacheGroup]:
    """The groups of `caches` (layer name to tensor). LayoutError: one of them cannot be stored.

    `config`: vLLM's KVCacheConfig. `layers`: its attention layers by name.
    """
    groups = [(i, config.kv_cache_groups[i]) for i in config.transfer_group_ids]
    made = []
    for i, group in groups:
        spec = _spec(i, group)
        names = sorted((n for n in group.layer_names if n in caches), key=_place)
        tensors: dict[int, tuple[str, torch.Tensor]] = {}
        for name in names:  # layers that share their KV with an earlier one bring the same tensor
            tensors.setdefault(caches[name].data_ptr(), (name, caches[name]))
        if not tensors:
            raise LayoutError(f"KV group {i} has no tensors of its own")
        own = [name for name, _ in tensors.values()]
        made.append(_group(i, spec, own, [t for _, t in tensors.values()], config, layers))
        if len(groups) > 1:
            window = getattr(spec, "sliding_window", None) or "all"
            where = ",".join(("draft " if is_draft(n) else "") + str(layer_index(n)) for n in own)
            made[-1] = made[-1]._replace(part=f"layers {where}; window {window}")
    return made


def layer_index(name: str) -> int:
    """The index of a layer in the model, from its name."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else 0


def is_draft(name: str) -> bool:
    """The layer is a draft model's, which vLLM computes after the model's own."""
    return name.startswith(_DRAFT)


def overwrites_early(vllm_config: Any, config: Any) -> bool:
    """A step may write blocks before the connector's first hook: vLLM's V2 runner zeroes new ones
    (caches of mixed precision) and copies those of which a request takes a part."""
    hashed = config.hash_block_size
    copies = hashed and any(g.kv_cache_spec.block_size > hashed for g in config.kv_cache_groups)
    zeroes = getattr(config, "needs_kv_cache_zeroing", False)
    return bool((zeroes or copies) and getattr(vllm_config, "use_v2_model_runner", False))


def _place(name: str) -> tuple[bool, int]:
    """Sort key: the order of computing."""
    return is_draft(name), layer_index(name)


def _spec(i: int, group: Any) -> Any:
    """The group's spec, if its KV can be restored. Raises LayoutError."""
    spec = group.kv_cache_spec
    if isinstance(spec, kv.UniformTypeKVCacheSpecs):
        kinds = {type(s) for s in spec.kv_cache_specs.values()}
        spec = next(iter(spec.kv_cache_specs.values()))
        if len(kinds) > 1:
            raise LayoutError(f"KV group {i} mixes {', '.join(sorted(k.__name__ for k in kinds))}")
    if not isinstance(spec, _RESTORED) or isinstance(spec, kv.SlidingWindowMLASpec):
        name = type(spec).__name__.removesuffix("Spec")
        raise LayoutError(
            f"KV group {i} ({name}, {len(group.layer_names)} layers) cannot be restored from a "
            "prefix: only full attention, MLA and sliding windows can"
        )
    if getattr(spec, "attention_chunk_size", None):
        raise LayoutError(f"KV group {i} attends in chunks of {spec.attention_chunk_size} tokens")
    return spec


def _group(
    i: int, spec: Any, names: list[str], tensors: list[torch.Tensor], config: Any,
    layers: Mapping[str, Any],
) -> CacheGroup:  # fmt: skip
    first = tensors[0]
    if first.dim() != 4 or first.shape[0] % config.num_blocks:
        raise LayoutError(
            f"{names[0]}: expected [{config.num_blocks} blocks, heads, tokens, content], "
            f"got {tuple(first.shape)}"
        )
    split = first.shape[0] // config.num_blocks
    name, isa = _backend(layers.get(names[0]))
    if isinstance(spec, kv.MLAAttentionSpec):
        if first.shape[1] != 1:
            raise LayoutError(f"{names[0]}: a latent has one head, got {tuple(first.shape)}")
        tensors = [t[:, 0] for t in tensors]
        layout, opaque = KVLayout.mla(tensors), False
    elif name == "CPU_ATTN" and isa in ("vec", "vec16"):
        layout, opaque = KVLayout.from_tensors(tensors, order="BHNC-KT"), False
        _probe_cpu(first, layout, isa)
    else:
        layout, opaque = KVLayout.from_tensors(tensors, order="BHNC"), name not in _SIDE_BY_SIDE
    return CacheGroup(
        number=i, names=names, caches=tensors, layout=layout, block_tokens=spec.block_size,
        split=split, backend=f"vllm {name} {isa}", opaque=opaque, part="",
        window=isinstance(spec, kv.SlidingWindowSpec),
    )  # fmt: skip


def _backend(layer: Any) -> tuple[str, str]:
    """The attention backend of a layer, and the instruction set that its packing depends on."""
    find = getattr(layer, "get_attn_backend", None)
    backend = find() if find else getattr(layer, "attn_backend", None)
    name = backend.get_name() if backend is not None else "unknown"
    return name, str(getattr(layer, "isa", "") or "")


def _probe_cpu(cache: torch.Tensor, layout: KVLayout, isa: str) -> None:
    """Let vLLM's own operation write a block of memory laid out as `cache` is, and check that K and
    V lie where we expect them. The engine's own blocks are not touched.

    Raises LayoutError: a layout that changes with a version of vLLM is detected here, before it can
    change an answer.
    """
    from vllm import _custom_ops as ops

    few = fewer(layout)
    blocks, heads, size, content = few.shape
    if cache.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise LayoutError(f"CPU attention with a {cache.dtype} cache is not supported")
    scratch = look_alike(few, torch.zeros(memory_of(few), dtype=torch.uint8))[0]
    halves = scratch.view(blocks, heads, 2 * size, content // 2).chunk(2, dim=2)
    rows = torch.arange(size * heads * content // 2, dtype=torch.float32) % 251
    k = rows.view(size, heads, content // 2).to(cache.dtype)
    v = -k - 1
    first = (blocks - 1) * size
    slots = torch.arange(first, first + size)
    ops.cpu_attn_reshape_and_cache(k, v, halves[0], halves[1], slots, isa)
    for i in range(size):
        for part, wanted in ((0, k[i]), (1, v[i])):
            if not torch.equal(token(layout, scratch, part, first + i), wanted):
                raise LayoutError(
                    f"vLLM's CPU attention ({isa}) no longer lays out a block as {layout.order}"
                )
