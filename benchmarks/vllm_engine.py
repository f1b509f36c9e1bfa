"""tierloom in a real vLLM: time to the first token, what hooks cost, and how long they hold it up.

    make bench-vllm                     # 4 minutes; writes bench-vllm.json

Run on a machine that does nothing else. SmolLM2-135M in float32 on one thread, 2,048 tokens, blocks
of 32; the yardstick is vLLM's own prefix cache in the same run. A figure whose answer is not, token
by token, what vLLM says without a connector is refused.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in ("tests/adapters", "tests/adapters/vllm"):
    sys.path.append(str(ROOT / folder))
import harness  # noqa: E402
import models  # noqa: E402

del sys.path[-2:]

from tierloom.adapters.demo import smollm2  # noqa: E402

TOKENS = 2048
ROUNDS = 5
STEPS = 200
KEYS, WAITING = 10_000, 64
OUT = ROOT / "bench-vllm.json"

OPTIONS = {"kv_cache_memory_bytes": 512 << 20}
ROOM = {
    "budget.arena": "256 MiB",
    "tiers.hot.capacity": "512 MiB",
    "tiers.warm.capacity": "2 GiB",
    "tiers.warm.segment": "256 MiB",
}


def main() -> None:
    if reason := harness.why_not():
        sys.exit(reason)
    with tempfile.TemporaryDirectory(dir=ROOT / "benchmarks") as folder:
        engine = harness.Engine(Path(folder))
        try:
            figures: dict[str, Any] = {"load_before": os.getloadavg()[0]}
            figures |= first_token(engine, Path(folder))
            figures |= hooks_of_a_decode_step(engine)
            figures |= scheduler_hooks(engine, Path(folder))
        finally:
            engine.close()
    OUT.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"\nwritten to {OUT.name}; load before: {figures['load_before']:.2f}")


def first_token(engine: harness.Engine, folder: Path) -> dict[str, Any]:
    model = smollm2.model_dir(progress=False)
    tokens, warm_up = document(model, TOKENS), harness.prompt(96, seed=1)
    kv = harness.transfer("tiered", **{"tiers.warm.path": str(folder / "kv")}, **ROOM)
    del kv["kv_connector_extra_config"]["graphs.retrieve.stages.plan.worth"]  # as a user has it
    rows: dict[str, list[harness.Answer]] = {}

    engine.use(model, enable_prefix_caching=True, **OPTIONS).one(warm_up)
    rows["cold, without tierloom"] = [engine.one(tokens)]
    right = rows["cold, without tierloom"][0].ids
    rows["vLLM's prefix cache"] = [engine.one(tokens) for _ in range(ROUNDS)]

    engine.use(model, kv, **OPTIONS).one(warm_up)
    rows["cold, with tierloom"] = [engine.one(tokens)]
    engine.settle()
    rows["tierloom, from memory"] = [engine.one(tokens) for _ in range(ROUNDS)]
    engine.settle()

    rows["tierloom, after a restart"] = []
    for _ in range(2):
        engine.use(model, kv, fresh=True, **OPTIONS).one(warm_up)
        rows["tierloom, after a restart"].append(engine.one(tokens))

    print(f"{TOKENS} tokens, SmolLM2-135M      TTFT wall s   CPU s   cached")
    figures: dict[str, Any] = {}
    for name, answers in rows.items():
        assert all(a.ids == right for a in answers), f"{name}: other tokens"
        wall = statistics.median(a.ttft_s or 0.0 for a in answers)
        cpu = statistics.median(a.ttft_cpu_s or 0.0 for a in answers)
        best = min(a.ttft_s or 0.0 for a in answers)
        print(f"  {name:<28} {wall:8.3f} ({best:.3f}) {cpu:7.3f} {answers[-1].cached:6d}")
        figures[name] = {"wall_s": wall, "best_s": best, "cpu_s": cpu, "cached": answers[-1].cached}
    own = figures["vLLM's prefix cache"]["wall_s"]
    cold = figures["cold, without tierloom"]["wall_s"]
    figures["memory / own prefix cache"] = figures["tierloom, from memory"]["wall_s"] / own
    figures["cold / restart"] = cold / figures["tierloom, after a restart"]["wall_s"]
    print(f"  from memory / vLLM's own: {figures['memory / own prefix cache']:.2f} (bar 1.15)")
    print(f"  cold / restart: {figures['cold / restart']:.1f} (bar 15)")
    return {"first token": figures}


def hooks_of_a_decode_step(engine: harness.Engine) -> dict[str, Any]:
    """Nothing is found, 30 layers: what the connector adds to each step."""
    kv = harness.transfer("minimal", **{"tiers.hot.capacity": "256 MiB"})
    engine.use(smollm2.model_dir(progress=False), kv, **OPTIONS)
    engine.ask("time_hooks")
    engine.one(harness.prompt(96, seed=2))
    run = engine.ask("decode", tokens=harness.prompt(200, seed=3), steps=STEPS)
    inside = sum(sum(calls) for calls in run["hooks"].values())
    step, cpu = sum(run["wall_s"]), sum(run["cpu_s"])
    calls = sum(len(c) for c in run["hooks"].values())
    print(f"\nhooks per decode step, nothing found: {inside / STEPS * 1e6:.0f} us", end="")
    print(f" in {calls / STEPS:.0f} calls, of {step / STEPS * 1e3:.1f} ms", end="")
    print(f" = {inside / cpu:.2%} (bar 1 %)")
    dearest = sorted(run["hooks"].items(), key=lambda item: -sum(item[1]))[:6]
    for name, seconds in dearest:
        print(f"  {name:<44} {sum(seconds) / STEPS * 1e6:8.1f} us")
    return {"decode step": {"hooks_s": inside / STEPS, "step_s": step / STEPS,
                            "step_cpu_s": cpu / STEPS, "share": inside / cpu}}  # fmt: skip


def scheduler_hooks(engine: harness.Engine, folder: Path) -> dict[str, Any]:
    """Many keys and many waiting requests: how long one hook holds up the scheduler."""
    kv = harness.transfer("minimal", **{"chunk.tokens": 32, "tiers.hot.capacity": "1 GiB"})
    engine.use(models.llama(folder / "llama"), kv, max_num_seqs=4, max_num_batched_tokens=8192)
    prompts = [harness.prompt(4000, seed=100 + i) for i in range(KEYS // 125 + 1)]
    for tokens in prompts:
        engine.one(tokens, max_tokens=1)
        engine.settle()
    keys = engine.ask("state")["scheduler"]["keys"]
    engine.ask("time_hooks")
    waiting = [tokens[:2000] + harness.prompt(500, seed=i) for i, tokens in enumerate(prompts)]
    engine.generate(*waiting[:WAITING], max_tokens=4)
    hooks = {k: v for k, v in engine.ask("hooks").items() if k.startswith("scheduler.")}
    print(
        f"\nscheduler's hooks, {keys} keys, {WAITING} requests   calls   p50 us   p99 us   max us"
    )
    figures: dict[str, Any] = {"keys": keys}
    every = [seconds for calls in hooks.values() for seconds in calls]
    for name, calls in [*sorted(hooks.items()), ("all", every)]:
        p50, p99 = quantile(calls, 0.5), quantile(calls, 0.99)
        print(f"  {name:<44} {len(calls):6d} {p50:8.1f} {p99:8.1f} {max(calls) * 1e6:8.1f}")
        figures[name] = {"calls": len(calls), "p50_us": p50, "p99_us": p99}
    return {"scheduler hooks": figures}


def quantile(seconds: list[float], q: float) -> float:
    """In microseconds."""
    return sorted(seconds)[min(len(seconds) - 1, int(q * len(seconds)))] * 1e6


def document(model: Path, length: int) -> list[int]:
    from transformers import AutoTokenizer

    text = (ROOT / "configs" / "demo.txt").read_text()
    ids: list[int] = AutoTokenizer.from_pretrained(model)(text * 2)["input_ids"]
    return ids[:length]


if __name__ == "__main__":
    main()
