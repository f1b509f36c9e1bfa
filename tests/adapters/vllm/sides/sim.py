"""vLLM's own scheduler and both sides of the connector, around a model that is a formula.

Run by vLLM's Python. A `World` is an engine without a model: KV at a position is a known function
of the tokens up to it, every layer's "attention" compares all it would read with that function, and
the next token follows from it. Blocks that nobody holds are overwritten at once. The hooks come in
the order of a `Runner`, one for each that vLLM's model runners can produce.
"""

from __future__ import annotations

import os
import random
import time
import uuid
from collections import deque
from types import SimpleNamespace as Bag
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

import tierloom.adapters.vllm.worker.side as worker_side
from tierloom.adapters.engine.rank import Rank
from tierloom.stages.ops import frame_copy as copying

if TYPE_CHECKING:
    from collections.abc import Callable

from sim_stage import (
    DIM,
    DRAFTS,
    HEADS,
    LAYERS,
    VOCAB,
    WRONG,
    Case,
    Model,
    Part,
    Stage,
    Step,
    Wrong,
    Zeroing,
)

HELD = ("flight", "open", "loads", "stores", "held", "asked", "requests", "jobs", "broken")


class World:
    """An engine, step by step."""

    def __init__(self, case: Case, config: Any, extra: dict[str, Any], seed: int = 0) -> None:
        """`config`: a VllmConfig, which is changed. `extra`: the connector's own."""
        self.case, self.config = case, config
        self.random = random.Random(seed)
        config.kv_transfer_config.engine_id = str(uuid.uuid4())
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if case.runners[-1].v2 else "0"
        stages = len(case.runners)
        config.cache_config.block_size = case.block
        config.cache_config.enable_prefix_caching = case.prefix
        config.cache_config.num_gpu_blocks = case.blocks
        config.scheduler_config.max_num_batched_tokens = case.budget
        config.scheduler_config.max_num_scheduled_tokens = case.budget
        config.scheduler_config.async_scheduling = case.ahead
        config.parallel_config.pipeline_parallel_size = stages
        config.parallel_config.world_size = stages
        config.kv_transfer_config.kv_connector_extra_config = {
            "tierloom.config": extra.pop("config", TIERS), "tierloom.weights": "w",
            "tierloom.load": case.load, "tierloom.save": case.save,
            "tierloom.save_decode": case.decode, "chunk.tokens": case.chunk,
            "chunk.grain": case.grain, "chunk.group": 2, "order": case.order, **extra,
        }  # fmt: skip
        each = (case.layers or LAYERS * stages) // stages
        names = [f"model.layers.{i}.attn" for i in range(each * stages)]
        drafts = [f"draft_model.layers.{i}.attn" for i in range(DRAFTS)]
        mine = [names[i * each : (i + 1) * each] for i in range(stages)]
        mine[-1] = mine[-1] + (drafts if case.drafter == "model" else [])
        spec = FullAttentionSpec(
            block_size=case.block, num_kv_heads=HEADS, head_size=DIM, dtype=torch.float32
        )
        backend = Bag(get_name=lambda: "FLASH_ATTN")
        every = [n for part in mine for n in part]
        config.compilation_config.static_forward_context = {
            n: Bag(attn_backend=backend) for n in every
        }

        def cache_config(layers: list[str]) -> Any:
            kind = Zeroing if case.runners[-1].zeroes else KVCacheConfig
            return kind(
                case.blocks, [], [KVCacheGroupSpec(layers, spec)],
                hash_block_size=case.block, cache_hit_alignment_tokens=case.block,
            )  # fmt: skip

        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(case.block, sha256)
        kind = AsyncScheduler if case.ahead else Scheduler
        self.stages = []
        for i, (runner, layers) in enumerate(zip(case.runners, mine, strict=True)):
            place = Rank(0, 1, i, stages, 0, 1)
            config.parallel_config.rank = i
            worker_side.vllm_rank = lambda _, place=place: place  # type: ignore[misc]
            self.stages.append(Stage(self, runner, layers, cache_config(layers)))
        self.scheduler = kind(
            vllm_config=config, kv_cache_config=cache_config(every),
            structured_output_manager=StructuredOutputManager(config), block_size=case.block,
            hash_block_size=case.block,
        )  # fmt: skip
        self._together = KVOutputAggregator(stages) if stages > 1 else None
        self.tokens: dict[str, list[int]] = {}
        """What the model has seen and said of each request."""
        self.said: dict[str, list[int]] = {}
        self.told: dict[str, dict[str, Any]] = {}
        """What the answer to a request said of its KV."""
        self._drafts: dict[str, list[int]] = {}
        self._queue: deque[tuple[Step, ModelRunnerOutput]] = deque()
        self.steps = 0
        self.read_late = 0
        self._watch()

    # -- requests

    def add(
        self, name: str, prompt: list[int], answer: int, *, session: bool = False,
        kv: dict[str, Any] | None = None, **more: Any,
    ) -> None:  # fmt: skip
        """`session`: more input may follow, by the same name, or an end. `kv`: what a proxy
        says of the request's KV."""
        sampling = SamplingParams(
            max_tokens=answer, ignore_eos=True, temperature=0,
            extra_args={"kv_transfer_params": kv} if kv is not None else None,
        )  # fmt: skip
        request = Request(
            name, list(prompt), sampling, None, block_hasher=self._hasher, resumable=session,
            **more,
        )  # fmt: skip
        known = name in self.scheduler.requests
        self.scheduler.add_request(request)
        self.said[name] = []
        if not known:
            self.tokens[name] = list(prompt)
        elif name in self.scheduler.requests:  # behind what was computed of what was said
            self.tokens[name] = list(self.scheduler.requests[name].all_token_ids)

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def preempt(self) -> None:
        """What vLLM does when blocks run out, and when its cache is reset under running requests.

        Not a reset with steps in flight: vLLM does that behind all of them.
        """
        while self._queue:
            self._deliver()
        self.scheduler.reset_prefix_cache(reset_running_requests=True)

    def sleep(self) -> None:
        """vLLM 0.33 gives the cache's memory back and takes it again, with other content."""
        for stage in self.stages:
            stage.connector.unregister_kv_caches()
            stage.fill(list(range(self.case.blocks)), WRONG)
            stage.connector.restore_kv_caches()
        self.scheduler.kv_cache_manager.reset_prefix_cache()

    # -- steps

    def step(self) -> None:
        """Plan one step, run it, and hand over what came of it, or of the one before."""
        depth = 2 if self.case.ahead else 1
        if self.scheduler.has_requests():
            step = self._plan()
            self._queue.append((step, self._run(step)))
            self.steps += 1
        if len(self._queue) >= depth or (self._queue and not self.scheduler.has_requests()):
            self._deliver()

    def until_idle(self, seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while self.scheduler.has_requests() or self._queue:
            self.step()
            if time.monotonic() > end:
                raise AssertionError(f"still busy: {self.report()}")

    def report(self) -> dict[str, Any]:
        workers = [s.connector.report() for s in self.stages]
        for w in workers:
            w.pop("stats")
        pool = self.scheduler.kv_cache_manager.block_pool
        return {
            "workers": workers, "scheduler": self.scheduler.connector.report(),
            "requests": list(self.scheduler.requests),
            "held": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        }  # fmt: skip

    def leaks(self) -> list[str]:
        """What an idle engine still holds."""
        said = self.report()
        out: list[str] = []
        for side in [*said["workers"], said["scheduler"]]:
            out += [f"{what}: {side[what]}" for what in HELD if side.get(what)]
        if said["requests"] or said["held"]:
            out.append(f"requests {said['requests']}, blocks {said['held']}")
        return out

    def close(self) -> None:
        for stage in self.stages:
            stage.connector.shutdown()
        self.scheduler.connector.shutdown()
        copying.gather_now = self._gather  # type: ignore[assignment]

    def _plan(self) -> Step:
        computed = {}
        real = self.scheduler._build_kv_connector_meta

        def note(connector: Any, output: Any) -> Any:
            manager = self.scheduler.kv_cache_manager
            for name in output.num_scheduled_tokens:
                computed[name] = self.scheduler.requests[name].num_computed_tokens
                tables[name] = list(manager.get_block_ids(name)[0])
            return real(connector, output)

        tables: dict[str, list[int]] = {}
        self.scheduler._build_kv_connector_meta = note  # type: ignore[method-assign]
        output = self.scheduler.schedule()
        self.scheduler._build_kv_connector_meta = real  # type: ignore[method-assign]
        return Step(output, tables, computed, self._free(), [])

    def _free(self) -> list[int]:
        blocks = self.scheduler.kv_cache_manager.block_pool.blocks
        return [
            b.block_id for b in blocks
            if not (b.ref_cnt or b.is_null or (self.case.prefix and b.block_hash is not None))
        ]  # fmt: skip

    def _run(self, step: Step) -> ModelRunnerOutput:
        output = step.output
        for name, n in output.num_scheduled_tokens.items():
            start, drafted = step.computed[name], []
            tokens = self.tokens[name]
            if name in output.scheduled_spec_decode_tokens:
                count = len(output.scheduled_spec_decode_tokens[name])
                drafted = (self._drafts.get(name, []) + [0] * count)[:count]
            states: list[int] = []
            # With steps in flight the scheduler counts drafts that were refused since.
            start = min(start, len(tokens) - 1) if start >= len(tokens) else start
            Model.grow(states, (tokens + drafted)[: start + n])
            step.parts.append(Part(name, step.tables[name], start, states, drafted, []))
        outs = [stage.run(step) for stage in self.stages]
        merged = outs[-1]
        if self._together is not None:
            made = [ModelRunnerOutput([], {}, kv_connector_output=o) for o in outs]
            last = self._together.aggregate(made, len(made) - 1)
            merged = last.kv_connector_output or KVConnectorOutput()
        for part in step.parts:
            bad = [w for w in part.wrong if not (w[3] & merged.invalid_block_ids)]
            if bad and not set(part.blocks) & merged.invalid_block_ids:
                raise Wrong(f"{part.request}: {bad[0][:3]} of {part.start} tokens, {self.case}")
        return self._sampled(step, merged)

    def _sampled(self, step: Step, connector: KVConnectorOutput) -> ModelRunnerOutput:
        names, sampled = [], []
        for part in step.parts:
            tokens = self.tokens[part.request]
            names.append(part.request)
            done = len(part.states) - len(part.drafted)
            if done < len(tokens) or set(part.blocks) & connector.invalid_block_ids:
                sampled.append([])
                continue
            said: list[int] = []
            for i in range(len(part.drafted) + 1):
                said.append(Model.following(part.states[done - 1 + i]))
                if i < len(part.drafted) and part.drafted[i] != said[-1]:
                    break
            sampled.append(said)
            tokens += said
            self._propose(part.request)
        return ModelRunnerOutput(
            names, {n: i for i, n in enumerate(names)}, sampled, kv_connector_output=connector
        )

    def _propose(self, name: str) -> None:
        """Some of what will come, and some that will not."""
        if not self.case.drafter:
            return
        states: list[int] = []
        Model.grow(states, self.tokens[name])
        drafts = []
        for _ in range(3):
            drafts.append(Model.following(states[-1]))
            if self.random.random() < 0.3:
                drafts[-1] = (drafts[-1] + 1) % VOCAB
            Model.grow(states, drafts[-1:])
        self._drafts[name] = drafts

    def _deliver(self) -> None:
        step, output = self._queue.popleft()
        outputs = self.scheduler.update_from_output(step.output, output)
        if self.case.drafter and not self.case.ahead:
            names = [p.request for p in step.parts if p.request in self._drafts]
            drafts = DraftTokenIds(names, [list(self._drafts[n]) for n in names])
            self.scheduler.update_draft_token_ids(drafts)
        for group in outputs.values():
            for one in group.outputs:
                self.said[one.request_id] += one.new_token_ids
                if one.kv_transfer_params is not None:
                    self.told[one.request_id] = one.kv_transfer_params
        for name in list(self.tokens):  # a request that is computed again says the same again
            request = self.scheduler.requests.get(name)
            if request is None or request.is_finished():
                self.tokens.pop(name)
                self._drafts.pop(name, None)

    def _watch(self) -> None:
        """Copies out of blocks that nobody holds are counted; each may be late."""
        self._gather: Callable[..., None] = copying.gather_now
        mine, world = self._gather, self

        def gather(table: Any, frames: Any, slots: Any, stop: Any, *rest: Any, **more: Any) -> None:
            if world.case.slow:
                time.sleep(random.random() * world.case.slow)
            stage = next((s for s in world.stages if int(table.base[0]) in s.bases), None)
            world.read_late += stage is not None and not stop[0] and stage.reads_freed(slots)
            mine(table, frames, slots, stop, *rest, **more)
            world.read_late += stage is not None and not stop[0] and stage.reads_freed(slots)

        copying.gather_now = gather  # type: ignore[assignment]


TIERS: dict[str, Any] = {
    "version": 1, "name": "sim",
    "chunk": {"tokens": 64, "grain": 32, "group": 2},
    "budget": {"arena": "8 MiB", "threads": 2},
    "tiers": {"hot": {"use": "memory", "capacity": "16 MiB"}},
    "graphs": {
        "store": {"stages": {
            "keys": {"use": "hash"}, "fresh": {"use": "lookup", "want": "absent"},
            "pack": {"use": "gather"}, "hot": {"use": "put", "tier": "hot"},
        }},
        "retrieve": {"stages": {
            "keys": {"use": "hash"}, "plan": {"use": "lookup", "worth": "always"},
            "fetch": {"use": "get"},
            "grow": {"use": "decode"}, "place": {"use": "scatter"},
        }},
    },
}  # fmt: skip
