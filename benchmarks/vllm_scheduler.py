"""The connector's scheduler side alone: microseconds per hook, 10,000 keys and 64 requests.

vLLM runs its scheduler in a process of its own, where no thread of a pipeline competes for the
GIL; `vllm_engine.py` measures the same hooks in a whole engine in one process. Run with vLLM's
environment: `.venv-vllm/bin/python benchmarks/vllm_scheduler.py`.
"""

from __future__ import annotations

import os
import random
import time
from types import SimpleNamespace
from typing import Any

from tierloom.adapters.vllm.exchange.messages import (
    CacheEvent,
    WorkerInfo,
    WorkerReport,
    WorkerReports,
)
from tierloom.adapters.vllm.exchange.settings import RequestOptions, configured
from tierloom.adapters.vllm.scheduler.request import TrackedRequest
from tierloom.adapters.vllm.scheduler.side import SchedulerSide
from tierloom.stages.kv.namespace import Namespace
from tierloom.stages.kv.prefix import Chain

KEYS, WAITING, TOKENS, BLOCK, CHUNK = 10_000, 64, 2_500, 32, 256
ROUNDS = 20


def main() -> None:
    rng = random.Random(0)
    requests = [_request(str(i), rng) for i in range(WAITING)]
    side = _side()
    _fill(side, requests)
    spent: dict[str, list[float]] = {}

    def timed(name: str, hook: Any, *args: Any) -> Any:
        began = time.perf_counter()
        out = hook(*args)
        spent.setdefault(name, []).append(time.perf_counter() - began)
        return out

    for _ in range(ROUNDS):
        for request in requests:
            timed("on_new_request", side.on_new_request, request)
        for request in requests:
            found, _ = timed(
                "get_num_new_matched_tokens", side.get_num_new_matched_tokens, request, 0
            )
            blocks = SimpleNamespace(get_block_ids=lambda: (list(range(1, TOKENS // BLOCK + 2)),))
            if found:
                timed(
                    "update_state_after_alloc",
                    side.update_state_after_alloc,
                    request,
                    blocks,
                    found,
                )
        output = SimpleNamespace(total_num_scheduled_tokens=0, num_scheduled_tokens={})
        timed("build_connector_meta", side.build_connector_meta, output)
        news = WorkerReports(
            {
                0: WorkerReport(
                    events=[CacheEvent(0, "hot", True, os.urandom(32 * 8)) for _ in range(32)]
                )
            }
        )
        timed("update_connector_output", side.update_connector_output, news)
        for request in requests:
            timed("request_finished_all_groups", side.request_finished_all_groups, request, ([],))
    print(f"{side.report()['keys']} keys, {WAITING} requests of {TOKENS} tokens")
    print(f"{'hook':32} {'calls':>6} {'p50 us':>8} {'p99 us':>8}")
    for name, seconds in [*spent.items(), ("all", [s for v in spent.values() for s in v])]:
        ranked = sorted(seconds)
        p50, p99 = (ranked[int(len(ranked) * q)] * 1e6 for q in (0.5, 0.99))
        print(f"{name:32} {len(ranked):6} {p50:8.1f} {p99:8.1f}")


def _side() -> SchedulerSide:
    transfer = SimpleNamespace(is_kv_consumer=True, is_kv_producer=True)
    config = SimpleNamespace(
        kv_transfer_config=transfer,
        parallel_config=SimpleNamespace(world_size=1),
        max_concurrent_batches=1,
    )
    group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=BLOCK))
    caches = SimpleNamespace(
        kv_cache_groups=[group], cache_hit_alignment_tokens=BLOCK, hash_block_size=BLOCK
    )
    side = SchedulerSide(config, caches, configured({}))
    info = WorkerInfo(
        namespace=Namespace(model="m"), grain=BLOCK, chunk=CHUNK, unit=BLOCK, groups=1,
        tiers=("hot", "warm"), remote="", uses={}, worth="auto", deadline=0.8, token_bytes=1000,
        off="",
    )  # fmt: skip
    side.update_connector_output(WorkerReports({0: WorkerReport(info=info)}))
    return side


def _request(name: str, rng: random.Random) -> SimpleNamespace:
    tokens = [rng.randrange(50_000) for _ in range(TOKENS)]
    return SimpleNamespace(
        request_id=name, kv_transfer_params=None, prompt_embeds=None, prompt_token_ids=tokens,
        lora_request=None, num_tokens=TOKENS, num_prompt_tokens=TOKENS, all_token_ids=tokens,
        mm_features=[], block_hashes=[], cache_salt=None, num_computed_tokens=0, status=0,
    )  # fmt: skip


def _fill(side: SchedulerSide, requests: list[SimpleNamespace]) -> None:
    """Half of the requests are kept, and as many other chunks as make `KEYS`."""
    seen: list[CacheEvent] = []
    for request in requests[: WAITING // 2]:
        tracked = TrackedRequest(request, RequestOptions(), None)
        tracked.chain = Chain(side.info.namespace.digest, BLOCK)
        links = b"".join(tracked.links("own").links)
        step = 32 * CHUNK // BLOCK
        seen += [
            CacheEvent(0, "hot", True, links[i : i + step]) for i in range(0, len(links), step)
        ]
    while len(seen) < KEYS:
        seen.append(CacheEvent(0, "hot", True, os.urandom(32 * 8)))
    side.update_connector_output(WorkerReports({0: WorkerReport(events=seen)}))


if __name__ == "__main__":
    main()
