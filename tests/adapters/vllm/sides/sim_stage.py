"""What a `World` of `sim.py` is made of: runners, a model that is a formula, and its stages.

Run by vLLM's Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput

from tierloom.adapters.vllm.connector import TierloomConnector

if TYPE_CHECKING:
    from sim import World

VOCAB = 400
HEADS, DIM, LAYERS, DRAFTS = 2, 4, 3, 2
WRONG = -7.0
"""What a block that nobody holds is filled with."""


@dataclass(frozen=True)
class Runner:
    """The order in which a model runner calls the hooks of a step."""

    name: str
    deferred: bool = False
    """What has ended is asked before the drafter runs, and `wait_for_save` comes behind it."""
    finalized: bool = True
    """`wait_for_save` comes at all: a pipeline stage that is not the last leaves it out."""
    late_drafter: bool = True
    """The drafter runs behind the hooks, not before them."""
    layers: bool = True
    """The hooks around attention are called; a full CUDA graph leaves them out."""
    v2: bool = False
    zeroes: bool = False
    """New blocks are zeroed, by V2 before the first hook."""


V1 = Runner("V1")
V1_SPEC = Runner("V1, drafting", deferred=True)
V1_SPEC_STAGE = Runner("V1, drafting, not the last stage", deferred=True, finalized=False)
V2 = Runner("V2", v2=True)
V1_ZERO = Runner("V1, zeroing", zeroes=True)
V2_ZERO = Runner("V2, zeroing", zeroes=True, v2=True)
V2_GRAPH = Runner("V2, full graph", layers=False, v2=True)
V2_SPEC = Runner("V2 of 0.32, drafting", late_drafter=False, v2=True)
V2_SPEC_33 = Runner("V2 of 0.33, drafting", deferred=True, v2=True)


@dataclass(frozen=True)
class Case:
    """One engine."""

    runners: tuple[Runner, ...] = (V1,)
    """Of each worker: a pipeline stage."""
    layers: int = 0
    """Of the whole model; 0: three of each worker."""
    ahead: bool = False
    """Asynchronous scheduling: a step is planned before the one before it has ended."""
    load: str = "async"
    save: str = "step"
    decode: bool = True
    drafter: str = ""
    """`ngram`, or `model`: one with layers of its own."""
    block: int = 32
    chunk: int = 64
    grain: int = 32
    order: str = "auto"
    dense: bool = True
    """A block of the cache is one run of memory, so that `auto` takes native order."""
    budget: int = 256
    """Tokens of a step."""
    blocks: int = 40
    prefix: bool = False
    """vLLM's own prefix cache is on."""
    slow: float = 0.0
    """Seconds that a copy of a save may be late, at most."""


class Zeroing(KVCacheConfig):
    """As of a model whose layers are kept in several precisions."""

    needs_kv_cache_zeroing = True


class Wrong(AssertionError):
    """Attention would have read KV that is not the prompt's."""


class Model:
    """The next token, and the KV of every position, of a sequence."""

    def __init__(self) -> None:
        self.state: dict[str, list[int]] = {}

    @staticmethod
    def grow(state: list[int], tokens: list[int]) -> None:
        """States up to each position; a state depends on all tokens before."""
        last = state[-1] if state else 1
        for token in tokens:
            last = (last * 1103 + token * 12345 + 7) % 8388593
            state.append(last)

    @staticmethod
    def following(state: int) -> int:
        return state % VOCAB

    @staticmethod
    def kv(states: list[int], layer: int) -> torch.Tensor:
        """[tokens, heads, 2 x dim], exact in float32."""
        at = np.array(states, np.int64)[:, None, None]
        head, channel = np.arange(HEADS)[None, :, None], np.arange(2 * DIM)[None, None, :]
        mixed = (at * (31 + layer) + head * 7919 + channel * 104729) % 16777213
        return torch.from_numpy(mixed.astype(np.float32))


class Stage:
    """A worker: its cache, its connector, its order of hooks."""

    def __init__(self, world: World, runner: Runner, names: list[str], config: Any) -> None:
        case = world.case
        self.world, self.runner = world, runner
        self.own = [n for n in names if not n.startswith("draft")]
        self.drafts = [n for n in names if n.startswith("draft")]
        shape = (case.blocks, HEADS, case.block, 2 * DIM)
        self.caches = {}
        for name in names:
            if case.dense:
                cache = torch.full(shape, WRONG)
            else:  # a token's heads side by side
                b, h, n, c = shape
                cache = torch.full((b, n, h, c), WRONG).transpose(1, 2)
            self.caches[name] = cache
        self.connector = TierloomConnector(world.config, KVConnectorRole.WORKER, config)
        self.connector.register_kv_caches(self.caches)
        self.freed: set[int] = set()
        self.bases = {cache.data_ptr() for cache in self.caches.values()}

    def run(self, step: Step) -> KVConnectorOutput:
        c, runner, out = self.connector, self.runner, KVConnectorOutput()
        meta, zeroed = step.output.kv_connector_metadata, step.output.new_block_ids_to_zero or []
        if runner.v2:
            self.fill(zeroed, 0.0)
        c.handle_preemptions(meta)
        self.freed = set(step.free)  # what nobody holds, others may write from here on
        self.fill(step.free, WRONG)
        self.fill(zeroed, 0.0)
        c.bind_connector_metadata(meta)
        computes = step.output.total_num_scheduled_tokens > 0
        late = not (computes and step.output.has_sync_kv_loads)
        if not late:
            c.start_load_kv(None)
        if computes:
            self.attend(step, self.own)
            if runner.v2:
                c.finish_forward()
            if not runner.late_drafter:
                self.draft(step)
        if late:
            c.start_load_kv(None)
        deferred = runner.deferred and computes
        if not deferred:
            c.wait_for_save()
        got = c.get_transfer_results(step.output.finished_req_ids)
        out.finished_sending, out.finished_recving = got.finished_sending, got.finished_recving
        out.failed_recving = got.failed_recving
        out.invalid_block_ids = c.get_block_ids_with_load_errors()
        out.kv_connector_worker_meta = c.build_connector_worker_meta()
        if not deferred:
            c.clear_connector_metadata()
        if computes and runner.late_drafter:
            self.draft(step)
        if deferred and runner.finalized:
            c.wait_for_save()
            c.clear_connector_metadata()
        return out

    def fill(self, blocks: list[int], value: float) -> None:
        for cache in self.caches.values():
            cache[blocks] = value

    def reads_freed(self, slots: Any) -> bool:
        native = self.connector.worker.pipelines[0].pipeline.native
        blocks = slots if native else slots // self.world.case.block
        return bool(set(blocks.tolist()) & self.freed)

    def attend(self, step: Step, names: list[str]) -> None:
        for name in names:
            if self.runner.layers:
                self.connector.wait_for_layer_load(name)
            for part in step.parts:
                self.check(part, name)
                self.write(part, name)
            if self.runner.layers:
                self.connector.save_kv_layer(name, None, None)

    def draft(self, step: Step) -> None:
        """The drafter's own layers, over the same positions. It may run more than once."""
        for _ in range(2 if self.drafts else 0):
            self.attend(step, self.drafts)

    def slots(self, part: Part, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        at = torch.arange(start, end)
        return torch.tensor(part.blocks)[at // self.world.case.block], at % self.world.case.block

    def check(self, part: Part, name: str) -> None:
        if part.start:
            blocks, at = self.slots(part, 0, part.start)
            seen = self.caches[name][blocks, :, at]
            right = Model.kv(part.states[: part.start], layer_of(name))
            bad = (seen != right).flatten(1).any(1).nonzero().flatten().tolist()
            if bad:
                part.wrong.append((name, bad[0], len(bad), {int(blocks[i]) for i in bad}))

    def write(self, part: Part, name: str) -> None:
        blocks, at = self.slots(part, part.start, len(part.states))
        fresh = Model.kv(part.states[part.start :], layer_of(name))
        self.caches[name][blocks, :, at] = fresh


def layer_of(name: str) -> int:
    return int(name.split(".")[-2]) + (100 if name.startswith("draft") else 0)


@dataclass
class Part:
    """One request in a step."""

    request: str
    blocks: list[int]
    start: int
    states: list[int]
    """Of all positions up to the last that is computed."""
    drafted: list[int]
    wrong: list[tuple[str, int, int, set[int]]]


@dataclass
class Step:
    output: Any
    tables: dict[str, list[int]]
    computed: dict[str, int]
    free: list[int]
    parts: list[Part]
