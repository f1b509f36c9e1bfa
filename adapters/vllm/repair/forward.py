"""Some tokens of a request, computed anew by the engine's own model over the KV that lies there.

Each stretch [a, b) of a prompt is one sequence of a batch: b tokens seen, b - a of them computed,
with the request's block table. vLLM writes a layer's fresh rows before that layer attends, so each
token sees the rows that lie before it and the fresh ones among them: selective recompute, as of
Yao et al., "CacheBlend", arXiv 2405.16444, with any attention backend and no model's code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from tierloom.adapters.vllm.repair.engine_model import EngineModel
from tierloom.stages.errors import InputError
from tierloom.stages.kv.block_table import BlockTable

Stretch = tuple[int, int]
"""First token of a prompt to be computed, and one past the last."""


class ModelInput(NamedTuple):
    """What one call of the model computes: sequences one after another, the shortest first."""

    ids: torch.Tensor
    """int32 [tokens]: compiled graphs do not check it, and read other widths as garbage."""
    positions: torch.Tensor
    """int64 [tokens], contiguous: operations in C++ read it as such."""
    slots: torch.Tensor
    """int64 [tokens]"""
    lengths: list[int]
    """Tokens of each sequence that are computed."""
    seen: list[int]
    """Tokens of each that its last one attends to."""


def cut(stretches: Sequence[Stretch], tokens: int, sequences: int) -> list[list[Stretch]]:
    """Slices of at most `tokens` tokens and `sequences` stretches, in rising positions.

    Computing them one after another gives what computing all at once does. A stretch that does not
    fit goes on in the next slice. `stretches` rise and do not overlap; both limits are at least 1.
    """
    if min(tokens, sequences) < 1:
        raise InputError(f"slices of {tokens} tokens and {sequences} stretches hold nothing")
    slices: list[list[Stretch]] = []
    left = 0
    for first, end in stretches:
        while first < end:
            if not left or len(slices[-1]) == sequences:
                slices.append([])
                left = tokens
            until = min(end, first + left)
            slices[-1].append((first, until))
            left -= until - first
            first = until
    return slices


Made = TypeVar("Made")


def together(make: Callable[[], Made]) -> Made:
    """What `make` returns, once it has returned on all tensor-parallel ranks.

    Whatever a rank may fail at alone is made before a call of the model that all must make, or the
    others would wait for it in vLLM's collectives. Raises what `make` raised, on the others
    RuntimeError. All ranks call it in step.
    """
    from vllm.distributed.parallel_state import get_tp_group

    made: Any = None
    error: Exception | None = None
    try:
        made = make()
    except Exception as raised:
        error = raised
    if (group := get_tp_group()).world_size > 1:
        well = torch.tensor([error is None], dtype=torch.int32)
        torch.distributed.all_reduce(well, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
        if error is None and not well:
            error = RuntimeError("another rank could not go on")
    if error is not None:
        raise error
    return made  # type: ignore[no-any-return]


class Repair:
    """Calls the engine's model on chosen tokens. Used by the worker's one thread, on its stream.

    All tensor-parallel ranks make the same calls in the same order, or vLLM's collectives hang.
    """

    def __init__(
        self, model: EngineModel, vllm_config: Any, kv_cache_config: Any, group: Any
    ) -> None:
        """Raises what vLLM's builders of attention metadata raise."""
        self.model, self.group, self._vllm = model, group, vllm_config
        self.tokens = int(vllm_config.scheduler_config.max_num_batched_tokens)
        """The most tokens of one call: vLLM compiled its model for no more."""
        self.sequences = int(vllm_config.scheduler_config.max_num_seqs)
        """The most stretches of one call: backends keep buffers for no more."""
        self.vocabulary = int(vllm_config.model_config.get_vocab_size())
        self.longest = int(vllm_config.model_config.max_model_len)
        self._builders = _builders(model, vllm_config, kv_cache_config, group)

    def forward(
        self, stretches: Sequence[Stretch], block_ids: Sequence[int], token_ids: Sequence[int],
        *, skip_compiled: bool = False,
    ) -> None:  # fmt: skip
        """Compute `stretches` of a request, and write their K and V of every layer to its blocks.

        Loaded rows of a layer must lie there when vLLM calls `wait_for_layer_load` for it.
        `block_ids`: vLLM's blocks that hold the prompt's tokens from the first on; `token_ids`: the
        prompt's. `stretches` rise, do not overlap, and are within the limits of one call (`cut`).
        On a GPU this launches work on the current stream, and does not wait for it.

        Raises InputError, before anything is computed, where one of that does not hold, and what
        `together` raises.
        """
        batch = together(lambda: self.batch(stretches, block_ids, token_ids))
        self.compute(batch, block_ids, skip_compiled=skip_compiled)

    def batch(
        self, stretches: Sequence[Stretch], block_ids: Sequence[int], token_ids: Sequence[int]
    ) -> ModelInput:
        """`stretches` as the model takes them, those of fewest tokens first: some backends want
        what looks like decoding in front. Raises InputError as `forward` does."""
        self._check(stretches, block_ids, token_ids)
        order = sorted(stretches, key=lambda s: s[1] - s[0])
        at = np.concatenate([np.arange(*s, dtype=np.int64) for s in order])
        ids = np.asarray(token_ids)[at]
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary:
            raise InputError(
                f"token ids from {ids.min()} to {ids.max()}: the model has {self.vocabulary}"
            )
        device = self.model.device
        return ModelInput(
            torch.from_numpy(ids.astype(np.int32)).to(device), torch.from_numpy(at).to(device),
            torch.from_numpy(self.slots(block_ids)[at]).to(device),
            [end - first for first, end in order], [end for _, end in order],
        )  # fmt: skip

    def compute(
        self, batch: ModelInput, block_ids: Sequence[int], skip_compiled: bool = False
    ) -> None:
        """One call of the model, exactly as vLLM's runner makes it."""
        from vllm.forward_context import set_forward_context

        with torch.inference_mode():
            metadata = together(lambda: self._metadata(batch, block_ids))
            with set_forward_context(
                metadata, self._vllm, num_tokens=len(batch.ids),
                slot_mapping=dict.fromkeys(metadata, batch.slots), skip_compiled=skip_compiled,
            ):  # fmt: skip
                self.model.module(
                    input_ids=batch.ids, positions=batch.positions, intermediate_tensors=None,
                    inputs_embeds=None,
                )  # fmt: skip

    def slots(self, block_ids: Sequence[int]) -> npt.NDArray[np.int64]:
        """Where each token of these blocks lies in the tensors."""
        table = BlockTable(block_ids)
        return table.rows(
            len(block_ids) * self.group.block_tokens, self.group.block_tokens, native=False
        )

    def _check(
        self, stretches: Sequence[Stretch], block_ids: Sequence[int], token_ids: Sequence[int]
    ) -> None:
        held = min(len(block_ids) * self.group.block_tokens, len(token_ids), self.longest)
        before = 0
        for first, end in stretches:
            if not before <= first < end <= held:
                raise InputError(
                    f"stretch [{first}, {end}) must hold a token, begin at {before} or later, and "
                    f"end within the {held} tokens that have a block and an id"
                )
            before = end
        if not stretches or len(stretches) > self.sequences:
            raise InputError(f"{len(stretches)} stretches: one call takes 1 to {self.sequences}")
        if (total := sum(end - first for first, end in stretches)) > self.tokens:
            raise InputError(f"{total} tokens: one call takes {self.tokens} at most")
        ids = np.asarray(block_ids)[: -(-before // self.group.block_tokens)]
        last = self.group.layout.blocks // self.group.split - 1
        if int(ids.min()) < 1 or int(ids.max()) > last:  # 0 is vLLM's null block
            raise InputError(f"blocks {ids.min()} to {ids.max()} are not all within 1..{last}")

    def _metadata(self, batch: ModelInput, block_ids: Sequence[int]) -> dict[str, Any]:
        """Of each layer what its backend's own builder makes of `batch`."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        device, n = self.model.device, len(batch.seen)
        begins = torch.tensor([0, *np.cumsum(batch.lengths).tolist()], dtype=torch.int32)
        seen = torch.tensor(batch.seen, dtype=torch.int32)
        table = BlockTable(block_ids).split(self.group.split, self.group.layout.block_tokens)
        blocks = torch.as_tensor(np.asarray(table.blocks, np.int32)).to(device)
        shared = CommonAttentionMetadata(
            query_start_loc=begins.to(device), query_start_loc_cpu=begins,
            seq_lens=seen.to(device), seq_lens_cpu_upper_bound=seen, max_seq_len=max(batch.seen),
            num_reqs=n, num_actual_tokens=len(batch.ids), max_query_len=max(batch.lengths),
            block_table_tensor=blocks.expand(n, -1).contiguous(), slot_mapping=batch.slots,
            causal=True, positions=batch.positions, is_prefilling=torch.ones(n, dtype=torch.bool),
        )  # fmt: skip
        made: dict[str, Any] = {}
        for builder, names in self._builders:
            made |= dict.fromkeys(names, builder.build(0, shared))
        return made


def _builders(
    model: EngineModel, vllm_config: Any, kv_cache_config: Any, group: Any
) -> list[tuple[Any, list[str]]]:
    """Builders of our own, one for all layers that vLLM would give the same: its runner's have
    buffers that a captured graph still reads."""
    from vllm.config import set_current_vllm_config

    alike: dict[Any, list[str]] = {}
    whole = kv_cache_config.kv_cache_groups[group.number].kv_cache_spec
    for name, layer in model.layers.items():
        spec = getattr(whole, "kv_cache_specs", {}).get(name, whole)
        if group.split > 1:
            spec = spec.copy_with_new_block_size(group.layout.block_tokens)
        alike.setdefault((layer.get_attn_backend(), spec, layer.num_heads), []).append(name)
    with set_current_vllm_config(vllm_config):
        return [
            (backend.get_builder_cls()(spec, names, vllm_config, model.device), names)
            for (backend, spec, _), names in alike.items()
        ]
