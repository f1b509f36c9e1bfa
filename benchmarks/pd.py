"""A prefiller and a decoder: the first token, and how much has landed when the prefiller answers.

    make bench-pd                       # 8 minutes; writes bench-pd.json
    .venv/bin/python benchmarks/pd.py 7680

Two real vLLM engines on this machine, SmolLM2-135M in float32 on one thread each, prompts of 2,048
tokens. Beside the hand-off: the same prompt out of the decoder's own memory, and computed; what
the prefiller's process computes where nobody fetches; and the decoder's steps for other requests
while a prompt lands. An answer that is not, token by token, that of one engine alone is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in ("tests/adapters", "tests/adapters/vllm"):
    sys.path.append(str(ROOT / folder))
import harness  # noqa: E402

del sys.path[-2:]

from tierloom.adapters.demo import smollm2  # noqa: E402

ROUNDS, COLD, TOGETHER, WARM = 7, 3, 3, 3
DECODES = 8
"""Requests that are answered while a prompt lands."""
OUT = ROOT / "bench-pd.json"
ASKS = {"do_remote_decode": True, "do_remote_prefill": False}
ROOM = {
    "budget.arena": "256 MiB", "tiers.hot.capacity": "256 MiB", "tiers.warm.capacity": "2 GiB",
    "tiers.warm.segment": "256 MiB",
}  # fmt: skip
"""So little that memory is used again after WARM prompts, as in an engine that has run for a while:
touching fresh pages takes several times as long as receiving into them."""
LARGE = {"budget.arena": "1 GiB", "tiers.hot.capacity": "768 MiB"}
OPTIONS = {"kv_cache_memory_bytes": 512 << 20, "max_model_len": 8192}


def engine(folder: Path, preset: str, role: str, **more: Any) -> harness.Engine:
    options = ROOM | {"tiers.warm.path": str(folder / preset)} | more
    kv = harness.transfer(preset, **options) | {"kv_role": role}
    made = harness.Engine(folder, preset)
    made.use(smollm2.model_dir(), kv, **OPTIONS)
    return made


def landed_bytes(decoder: harness.Engine) -> int:
    worker = decoder.ask("state")["workers"][0]
    return int(worker["stats"]["handoff"]["bytes"])


def after(p: harness.Engine, d: harness.Engine, tokens: int) -> dict[str, Any]:
    """The prefiller answers, then the decoder is asked."""
    times: dict[str, list[float]] = {"prefill": [], "handed_over": [], "own_hit": [], "cold": []}
    cpu: dict[str, list[float]] = {name: [] for name in times}
    for i in range(-WARM, ROUNDS):
        ids = harness.prompt(tokens, seed=1000 + i, vocab=49152)
        given = p.one(ids, kv=ASKS, max_tokens=1)
        answers = [d.one(ids, kv=given.kv), d.one(ids)]
        assert given.ids == answers[0].ids[:1], "the engines disagree"
        if i < 0:
            continue
        if i < COLD:
            d.settle()
            d.ask("reset")
            answers.append(d.one(ids))
        assert all(a.ids == answers[-1].ids for a in answers), "another answer"
        for name, answer in zip(times, [given, *answers], strict=False):
            assert answer.ttft_s is not None
            assert answer.ttft_cpu_s is not None
            times[name].append(answer.ttft_s)
            cpu[name].append(answer.ttft_cpu_s)
    figures = {f"{name}_ttft_s": statistics.median(took) for name, took in times.items()}
    return figures | {f"{name}_cpu_s": statistics.median(took) for name, took in cpu.items()}


def together(p: harness.Engine, d: harness.Engine, tokens: int) -> dict[str, Any]:
    """Both are asked at once."""
    said = p.one(harness.prompt(64, seed=9), kv=ASKS, max_tokens=1).kv
    assert said is not None
    shares, first, pushed, kept = [], [], [], []
    for i in range(TOGETHER):
        kept.append(p.one(harness.prompt(tokens, seed=3000 + i, vocab=49152), max_tokens=1))
        ids, ticket = harness.prompt(tokens, seed=2000 + i, vocab=49152), f"bench-{tokens}-{i}"
        before = landed_bytes(d)
        request = said | {"transfer_id": ticket, "remote_request_id": ticket}
        name = d.add(ids, kv=request)
        d.ask("step", times=3)
        given = p.one(ids, kv=ASKS | {"transfer_id": ticket}, max_tokens=1)
        when = landed_bytes(d) - before
        (answer,) = d.finish(name)
        assert answer.ids[:1] == given.ids, "another answer"
        shares.append(when / (landed_bytes(d) - before))
        assert answer.ttft_s is not None
        assert given.ttft_s is not None
        first.append(answer.ttft_s - given.ttft_s)
        pushed.append(given)
    cpu = [statistics.median(a.ttft_cpu_s or 0.0 for a in each) for each in (pushed, kept)]
    return {
        "prefill_cpu_s_with_push": cpu[0],
        "prefill_cpu_s_without": cpu[1],
        "push_to_none": cpu[0] / cpu[1],
        "landed_share_when_prefill_answered": statistics.median(shares),
        "first_token_behind_prefill_s": statistics.median(first),
    }


def beside(p: harness.Engine, d: harness.Engine, tokens: int) -> dict[str, Any]:
    """The decoder's CPU seconds of a step that gives a token to each of `DECODES` requests: before
    anything lands, while it lands as the prefiller computes, and while the prefiller computes for
    nobody."""
    said = p.one(harness.prompt(64, seed=9), kv=ASKS, max_tokens=1).kv
    others = [harness.prompt(64, seed=50 + i, vocab=49152) for i in range(DECODES)]
    steps: dict[str, list[float]] = {"alone": [], "landing": [], "pushing_to_nobody": []}
    for i in range(TOGETHER):
        ids, ticket = harness.prompt(tokens, seed=4000 + i, vocab=49152), f"beside-{tokens}-{i}"
        for name in ("landing", "pushing_to_nobody"):
            lands = name == "landing"
            given = ASKS | ({"transfer_id": ticket} if lands else {})
            asked = dict(said or {}, transfer_id=ticket, remote_request_id=ticket)
            mine = ids if lands else harness.prompt(tokens, seed=5000 + i, vocab=49152)
            thread = threading.Thread(target=p.one, args=(mine,), kwargs={"kv": given})
            thread.start()
            if lands:
                found = d.ask("beside", decodes=others, tokens=ids, kv=asked, most=6000)
                assert found["cached"] >= tokens - 64, found["cached"]
                steps["alone"] += found["alone_s"]
                steps[name] += found["gaps_s"][1:-1]  # those of its arrival and its own first token
            while thread.is_alive():
                timed = d.ask("decode", tokens=others[0], steps=8, more=others[1:])
                steps["pushing_to_nobody"] += [] if lands else timed["cpu_s"]
            thread.join()
    figures = {f"step_cpu_s_{name}": statistics.median(took) for name, took in steps.items()}
    figures |= {f"step_cpu_s_{name}_p99": sorted(took)[int(len(took) * 0.99)]
                for name, took in steps.items()}  # fmt: skip
    ratio = figures["step_cpu_s_landing"] / figures["step_cpu_s_pushing_to_nobody"]
    return figures | {"landing_to_nobody": ratio}


def main(tokens: int = 2048) -> None:
    if reason := harness.why_not():
        sys.exit(reason)
    figures: dict[str, Any] = {"prompt_tokens": tokens, "load_before": os.getloadavg()[0]}
    with contextlib.ExitStack() as stack:
        made_in = tempfile.TemporaryDirectory(dir=ROOT / "benchmarks", prefix=".bench-")
        folder = Path(stack.enter_context(made_in))
        room = LARGE if tokens > 2048 else {}
        made = engine(folder, "prefiller", "kv_producer", **room)
        p = stack.enter_context(contextlib.closing(made))
        patient = {"handoff.wait": "120 s"} | room
        d = stack.enter_context(contextlib.closing(engine(folder, "decoder", "kv_both", **patient)))
        if tokens == 2048:
            figures |= after(p, d, tokens)
            figures["to_own_hit"] = figures["handed_over_ttft_s"] / figures["own_hit_ttft_s"]
            figures["to_cold"] = figures["handed_over_ttft_s"] / figures["cold_ttft_s"]
        figures |= together(p, d, tokens) | beside(p, d, tokens)
    OUT.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
