"""A real vLLM engine at the other end of two pipes. Run by the python that has vLLM.

    .venv-vllm/bin/python tests/adapters/vllm/engine.py READ_FD WRITE_FD

One JSON object a line: `{"do": "start", ...}` comes in, `{"ok": ...}` or `{"error": traceback}`
goes out, in order. Pipes of their own, since vLLM writes to stdout as it likes. What can be done
are the methods of `Driver` without an underscore. Engines of one process come one after another.

The engine is stepped from here, not by `LLM.generate`: so a test can abort between two steps, and
times are taken where the token comes out.
"""

from __future__ import annotations

import gc
import inspect
import itertools
import json
import os
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULTS: dict[str, Any] = {
    "enforce_eager": True,
    "dtype": "float32",
    "block_size": 32,
    "max_model_len": 4096,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 8,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "disable_log_stats": False,
    "seed": 0,
}


_SAME = ("engine", "model_name")  # labels that say nothing within one engine


class Driver:
    """At most one engine, its requests by name, and what came out of them."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._ids = itertools.count()
        self._open: dict[str, _Request] = {}
        self._hooks: dict[str, list[float]] = {}
        self._published: list[Any] | None = None

    # ---- the engine

    def start(self, **options: Any) -> dict[str, Any]:
        """Start an engine; `options` are vLLM's own, over `DEFAULTS`."""
        assert self._llm is None, "stop the engine first"
        begun = time.perf_counter()
        from vllm import LLM

        if events := options.get("kv_events_config"):
            from vllm.config import KVEventsConfig

            options["kv_events_config"] = KVEventsConfig(**events)
            self._published = None
        imported = time.perf_counter()
        if "llvmlite.binding.ffi" in sys.modules:
            _replace_no_kernels()
        self._llm = LLM(**{**DEFAULTS, **options})
        self._open.clear()
        done = time.perf_counter()
        return {"import_s": imported - begun, "start_s": done - imported}

    def stop(self) -> None:
        """End the engine; the process stays."""
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None

    # ---- requests

    def generate(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """All of `requests` at once; what came out of each, in order."""
        names = [self.add(**request) for request in requests]
        return self.finish(names)

    def add(
        self,
        tokens: list[int] | None = None,
        text: str | None = None,
        *,
        max_tokens: int = 8,
        kv: dict[str, Any] | None = None,
        salt: str | None = None,
        lora: dict[str, Any] | None = None,
        priority: int = 0,
        name: str | None = None,
        **sampling: Any,
    ) -> str:
        """Give the engine a greedy request and return its name; it runs in `step` and `finish`."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        prompt: dict[str, Any] = {"prompt": text}
        if tokens is not None:
            prompt = {"prompt_token_ids": tokens}
        if salt is not None:
            prompt["cache_salt"] = salt
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            ignore_eos=sampling.pop("ignore_eos", True),
            detokenize=text is not None,
            extra_args={"kv_transfer_params": kv} if kv else None,
            **sampling,
        )
        name = name or f"r{next(self._ids)}"
        self._open[name] = request = _Request()
        adapter = LoRARequest(**lora) if lora else None
        self._llm.llm_engine.add_request(
            name, prompt, params, lora_request=adapter, priority=priority
        )
        request.wall, request.cpu = time.perf_counter(), time.process_time()
        return name

    def step(self, times: int = 1) -> dict[str, Any]:
        """So many steps; how many tokens each open request has by now, and what is not done."""
        for _ in range(times):
            self._step()
        return {name: len(request.ids) for name, request in self._open.items()}

    def abort(self, names: list[str]) -> None:
        self._llm.llm_engine.abort_request(names)
        for name in names:
            self._open[name].reason = "abort"

    def finish(self, names: list[str] | None = None) -> list[dict[str, Any]]:
        """Step until `names` (or all) are done; take them out, in order."""
        names = list(self._open) if names is None else names
        while any(self._open[name].reason is None for name in names):
            self._step()
        return [self._open.pop(name).result() for name in names]

    def _step(self) -> None:
        for output in self._llm.llm_engine.step():
            request = self._open.get(output.request_id)
            if request is None or request.reason == "abort":
                continue
            request.take(output)

    # ---- what the connector and the scheduler hold

    def settle(self, timeout: float = 20.0) -> dict[str, Any]:
        """Let stores under way end: step the idle engine until nothing is open; then `state()`.

        Stores are asynchronous, and what the worker has to say travels with a step.
        """
        end = time.monotonic() + timeout
        while True:
            if self._core() is not None:  # else it steps by itself, and `step` waits for tokens
                for _ in range(3):
                    self._step()
            state = self.state()
            if _idle(state) or time.monotonic() > end:
                return state
            time.sleep(0.02)

    def state(self) -> dict[str, Any]:
        """What is held now. `scheduler` is missing with an engine in several processes."""
        state: dict[str, Any] = {"workers": self._llm.collective_rpc(_worker_report)}
        if core := self._core():
            scheduler = core.scheduler
            pool = scheduler.kv_cache_manager.block_pool
            state |= {
                "scheduler": _report(scheduler.connector),
                "unfinished": len(scheduler.requests),
                "blocks": pool.num_gpu_blocks - 1,  # one is the null block
                "free_blocks": pool.get_num_free_blocks(),
            }
        return state

    def _core(self) -> Any:
        """The engine's core, where it runs in this process."""
        return getattr(self._llm.llm_engine.engine_core, "engine_core", None)

    def reset(self, connector: bool = True) -> bool:
        return bool(self._llm.reset_prefix_cache(reset_connector=connector))

    def metrics(self) -> dict[str, float]:
        """vLLM's metrics; `name{label=value}` to value or count."""
        found = {}
        for metric in self._llm.get_metrics():
            value = getattr(metric, "value", getattr(metric, "count", None))
            if value is not None:
                labels = {k: v for k, v in metric.labels.items() if k not in _SAME}
                label = ",".join(f"{k}={v}" for k, v in labels.items())
                found[f"{metric.name}{{{label}}}" if label else metric.name] = float(value)
        return found

    def events(self) -> list[dict[str, Any]]:
        """What has been published for routers since the last call; the first begins to listen."""
        publisher = self._core().scheduler.kv_event_publisher
        if self._published is None:
            self._published = []
            publisher.publish = self._published.append
        batches, self._published[:] = list(self._published), []
        return [
            {
                "kind": type(event).__name__,
                "medium": getattr(event, "medium", None),
                "hashes": [str(h) for h in getattr(event, "block_hashes", ())],
                "tokens": len(getattr(event, "token_ids", None) or ()),
            }
            for batch in batches
            for event in batch.events
        ]

    def blocks(self, tokens: list[int]) -> list[int]:
        """Ids of the blocks that hold `tokens`, by vLLM's own prefix cache."""
        pool = self._core().scheduler.kv_cache_manager.block_pool
        cached = pool.cached_block_hash_to_block._cache
        ids = [block.block_id for block in cached.values() if hasattr(block, "block_id")]
        return sorted(ids)[: len(tokens) // 32]

    def spoil(self, one: int, other: int) -> None:
        """Write one block of the engine's KV cache over another: a wrong cache on purpose.

        Exchanging them would not do: attention does not mind in which order the keys lie.
        """
        worker = self._core().model_executor.driver_worker
        for cache in worker.model_runner.kv_caches:
            cache[other] = cache[one]

    # ---- for benchmarks

    def decode(
        self, tokens: list[int], steps: int, more: Sequence[list[int]] = ()
    ) -> dict[str, Any]:
        """Wall and CPU seconds of so many decode steps, and of the connector's hooks in them.
        `more`: prompts that get a token in each of them as well."""
        others = [self.add(ids, max_tokens=steps + 64) for ids in more]
        while not all(self._open[other].ids for other in others):
            self._step()
        name = self.add(tokens, max_tokens=steps + 2)
        while not self._open[name].ids:
            self._step()
        self._hooks.clear()
        walls, cpus = [], []
        for _ in range(steps):
            wall, cpu = time.perf_counter(), time.process_time()
            self._step()
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
        hooks = self.hooks()
        self.finish([name])
        self.abort(others)
        self.finish(others)
        return {"wall_s": walls, "cpu_s": cpus, "hooks": hooks}

    def beside(
        self, decodes: list[list[int]], tokens: list[int], kv: Any, most: int = 512
    ) -> dict[str, Any]:
        """CPU seconds of each step from a request's arrival to its first token, while prompts
        beside it get a token in every step; and of as many steps before it. `most`: tokens of
        theirs, within which it must come."""
        names = [self.add(ids, max_tokens=most) for ids in decodes]
        while not all(self._open[name].ids for name in names):
            self._step()
        alone, gaps = ([self._timed_step() for _ in range(8)], [])
        name = self.add(tokens, kv=kv, max_tokens=1)
        while not self._open[name].ids:
            had = [len(self._open[one].ids) for one in names]
            gaps.append(self._timed_step())
            assert [len(self._open[one].ids) for one in names] == [n + 1 for n in had]
        found = self.finish([name])[0]
        self.abort(names)
        self.finish(names)
        return {"alone_s": alone, "gaps_s": gaps, "cached": found["cached"]}

    def _timed_step(self) -> float:
        began = time.process_time()
        self._step()
        return time.process_time() - began

    def time_hooks(self) -> None:
        """From now on note how long each hook takes that vLLM calls, in either role."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group
        from vllm.distributed.kv_transfer.kv_connector.v1.base import (
            KVConnectorBase_V1,
            SupportsHMA,
        )

        scheduler = self._core().scheduler.connector
        for side, connector in (("scheduler", scheduler), ("worker", get_kv_transfer_group())):
            for name in sorted({*dir(KVConnectorBase_V1), *dir(SupportsHMA)}):
                is_hook = inspect.isfunction(getattr(type(connector), name, None))
                if is_hook and not name.startswith("_"):
                    timed = _timed(getattr(connector, name), f"{side}.{name}", self._hooks)
                    setattr(connector, name, timed)

    def hooks(self) -> dict[str, list[float]]:
        """Seconds of each call since the last time, by `side.name`."""
        taken = dict(self._hooks)
        self._hooks.clear()
        return taken


class _Request:
    """What has come out of a request so far."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.cached: int | None = None
        self.reason: str | None = None
        self.wall = self.cpu = 0.0
        self.first: tuple[float, float] | None = None
        self.kv: Any = None

    def take(self, output: Any) -> None:
        self.ids = list(output.outputs[0].token_ids)
        if self.first is None and self.ids:
            self.first = (time.perf_counter() - self.wall, time.process_time() - self.cpu)
        if output.num_cached_tokens is not None:
            self.cached = output.num_cached_tokens
        self.kv = output.kv_transfer_params or self.kv
        if output.finished:
            self.reason = output.outputs[0].finish_reason or "unknown"

    def result(self) -> dict[str, Any]:
        wall, cpu = self.first or (None, None)
        return {
            "ids": self.ids,
            "cached": self.cached or 0,
            "reason": self.reason,
            "kv": self.kv,
            "ttft_s": wall,
            "ttft_cpu_s": cpu,
        }


def _timed(hook: Any, name: str, into: dict[str, list[float]]) -> Any:
    inside = _timed.__dict__  # hooks call each other: the outermost one counts

    def timed(*args: Any, **kwargs: Any) -> Any:
        if inside.get("busy"):
            return hook(*args, **kwargs)
        inside["busy"] = True
        begun = time.perf_counter()
        try:
            return hook(*args, **kwargs)
        finally:
            into.setdefault(name, []).append(time.perf_counter() - begun)
            inside["busy"] = False

    return timed


def _replace_no_kernels() -> None:
    """vLLM's CPU worker looks for its Triton kernels in every module of the process, and breaks on
    llvmlite's, which comes with the first engine's connector; that engine has replaced them all."""
    from vllm.platforms import current_platform

    type(current_platform).register_triton_kernel_overrides = lambda *_: None


def _worker_report(worker: Any) -> dict[str, Any]:
    """Runs in every worker's process."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    return _report(get_kv_transfer_group() if has_kv_transfer_group() else None)


def _report(connector: Any) -> dict[str, Any]:
    """What a connector says of itself; of each child's, for vLLM's MultiConnector."""
    if children := getattr(connector, "_connectors", None):
        return {"children": [_report(child) for child in children]}
    return connector.report() if hasattr(connector, "report") else {}


def _idle(state: dict[str, Any]) -> bool:
    reports = [*state["workers"], state.get("scheduler", {})]
    flat = [child for r in reports for child in r.get("children", [r])]
    held = ("open", "flight", "loads", "stores", "held", "asked", "requests", "jobs")
    return not any(r.get(what, 0) > 0 for r in flat for what in held) and (
        state.get("free_blocks") == state.get("blocks")
    )


def main(read: int, write: int) -> None:
    for fd in (read, write):
        os.set_inheritable(fd, False)  # vLLM's own processes would keep the pipe open
    # vLLM thaws all at an engine's end, and its five collections from a start to an end would walk
    # through what was imported each time: two seconds of CPU. The fork server's frozen heap stays.
    gc.freeze = gc.unfreeze = lambda: None
    driver = Driver()
    with os.fdopen(read) as commands, os.fdopen(write, "w") as answers:
        for line in commands:
            command = json.loads(line)
            try:
                answer = {"ok": getattr(driver, command.pop("do"))(**command)}
            except Exception:  # whatever it is, the test is told
                answer = {"error": traceback.format_exc()}
                print(answer["error"], file=sys.stderr, flush=True)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    driver.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
