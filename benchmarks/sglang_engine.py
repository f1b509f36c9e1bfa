"""The real SGLang on a CPU: what a hit saves, and what an empty store costs.

    .venv/bin/python benchmarks/sglang_engine.py --json bench-sglang-engine.json

SmolLM2-135M in float32. Medians of rounds that take turns; the engine is started anew where a
restart is what is measured. Copies between device and host are torch's here (see
tests/adapters/sglang/cpu_engine).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in ("tests/adapters/sglang", "tests/adapters", "tests/stages/tiers"):
    sys.path.append(str(ROOT / folder))

from real_engine import Engine, hicache, prompt  # noqa: E402

from tierloom.adapters.demo import smollm2  # noqa: E402

LENGTH = 2080
ROOM = {"max_total_tokens": 10_240, "context_length": 8192, "chunked_prefill_size": 4096}


def extra(folder: Path) -> dict[str, Any]:
    return {
        "backend_name": "tierloom", "module_path": "tierloom.adapters.sglang.hicache",
        "class_name": "TierloomHiCache", "interface_v1": 1, "prefetch_threshold": 32,
        "hicache_storage_pass_prefix_keys": True, "tierloom.config": "tiered",
        "tiers.hot.capacity": "1500 MiB", "tiers.warm.path": str(folder),
        "tiers.warm.capacity": "4 GiB", "budget.arena": "512 MiB",
        "graphs.retrieve.deadline": "30 s", "graphs.store.deadline": "60 s",
    }  # fmt: skip


def first_token(engine: Engine, tokens: list[int]) -> tuple[float, int]:
    answer = engine.one(tokens, max_tokens=1)
    return answer.seconds, answer.cached


def hits(engine: Engine, model: Path, rounds: int, folder: Path) -> dict[str, Any]:
    """First tokens of a text: computed, out of the device's own tree, and after a restart."""
    options = hicache(extra(folder), **ROOM)
    took: dict[str, list[float]] = {"cold": [], "device": [], "restarted": []}
    texts = [prompt(LENGTH, 200 + i, vocab=40_000) for i in range(rounds)]
    engine.use(model, **options)
    engine.one(prompt(LENGTH, 1, vocab=40_000), max_tokens=2)
    for text in texts:
        took["cold"].append(first_token(engine, text)[0])
        again, cached = first_token(engine, text)
        assert cached == (LENGTH - 1) // 32 * 32
        took["device"].append(again)
    time.sleep(5)
    found = 0
    for text in texts:
        engine.use(model, fresh=True, **options)
        engine.one(prompt(LENGTH, 1, vocab=40_000), max_tokens=2)  # compiles, maps, warms
        engine.flush()
        seconds, cached = first_token(engine, text)
        found = max(found, cached)
        took["restarted"].append(seconds)
    middle = {name: statistics.median(all_) for name, all_ in took.items()}
    return {name: round(value, 4) for name, value in middle.items()} | {
        "restarted_of_cold": round(middle["restarted"] / middle["cold"], 4),
        "restarted_above_device_s": round(middle["restarted"] - middle["device"], 4),
        "hit_tokens": found, "prompt_tokens": LENGTH, "rounds": rounds,
    }  # fmt: skip


def overhead(logs: Path, model: Path, rounds: int, folder: Path) -> dict[str, Any]:
    """Prefill and decode with an empty store, against SGLang's HiCache without a storage."""
    sides = {"without": hicache(None, **ROOM), "with": hicache(extra(folder), **ROOM)}
    engines = {name: Engine(logs, name) for name in sides}
    took: dict[str, list[float]] = {}
    try:
        for name, options in sides.items():
            engines[name].use(model, **options)
            engines[name].one(prompt(600, 3, vocab=40_000), max_tokens=8)
        for i in range(rounds):
            for name in list(sides)[:: 1 if i % 2 else -1]:
                text = prompt(LENGTH, 500 + i, vocab=40_000)
                prefill = first_token(engines[name], text)[0]
                both = engines[name].one(prompt(64, 900 + i, vocab=40_000), max_tokens=65).seconds
                took.setdefault(f"prefill_{name}", []).append(prefill)
                took.setdefault(f"decode_{name}", []).append(both)
                time.sleep(1.0)  # what it stores is behind it
    finally:
        for engine in engines.values():
            engine.close()
    middle = {name: statistics.median(all_) for name, all_ in took.items()}
    return {name: round(value, 4) for name, value in middle.items()} | {
        "prefill_ratio": round(middle["prefill_with"] / middle["prefill_without"], 4),
        "decode_ratio": round(middle["decode_with"] / middle["decode_without"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", default="bench-sglang-engine.json")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    model = smollm2.model_dir(progress=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "logs").mkdir()
        engine = Engine(folder / "logs")
        try:
            found = {"first_token_s": hits(engine, model, args.rounds, folder / "kv")}
        finally:
            engine.close()
        found["empty_store"] = overhead(folder / "logs", model, args.rounds, folder / "kv2")
    Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
