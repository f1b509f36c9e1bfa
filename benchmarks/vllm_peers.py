"""The first token in a real vLLM when another engine's process has the prompt.

    .venv/bin/python benchmarks/vllm_peers.py [--rounds N] [--json FILE]      # 2 minutes

Two engines with the preset `peer`, SmolLM2-135M in float32, 2,048 tokens. One computes them; in
each round the other has forgotten all it had, finds them at the first, and then in its own memory.
Every answer must be, token by token, what is computed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in ("tests/adapters", "tests/adapters/vllm"):
    sys.path.append(str(ROOT / folder))
sys.path.append(str(ROOT / "benchmarks"))
import harness  # noqa: E402
from vllm_engine import OPTIONS, ROOM, TOKENS, document  # noqa: E402

del sys.path[-3:]

from tierloom.adapters.demo import smollm2  # noqa: E402

SKIP = {"tierloom.skip_load": True, "tierloom.skip_save": True}
BARS = {"own": 1.25, "cold": 0.05}


def transfer(folder: Path, ports: list[int], n: int, **more: Any) -> dict[str, Any]:
    at = [f"127.0.0.1:{port}" for port in ports]
    own = {
        "serve.listen": at[n], "tiers.near.directory": at, "tiers.warm.path": str(folder / str(n)),
    }  # fmt: skip
    kv = harness.transfer("peer", **own, **ROOM, **more)
    del kv["kv_connector_extra_config"]["graphs.retrieve.stages.plan.worth"]  # as a user has it
    return kv


def first_tokens(folder: Path, rounds: int, **more: Any) -> dict[str, Any]:
    """Seconds to the first token, of each way a prompt came."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        ports = [sock.getsockname()[1] for sock in socks]
    model = smollm2.model_dir(progress=False)
    tokens, warm_up = document(model, TOKENS), harness.prompt(96, seed=1)
    found: dict[str, list[float]] = {"cold": [], "peer": [], "own": []}
    spent: dict[str, list[float]] = {"cold": [], "peer": [], "own": []}
    with contextlib.ExitStack() as stack:
        engines = [
            stack.enter_context(contextlib.closing(harness.Engine(folder, name)))
            for name in ("holder", "asker")
        ]
        for n, engine in enumerate(engines):
            engine.use(model, transfer(folder, ports, n, **more), **OPTIONS).one(warm_up)
        holder, asker = engines
        right = holder.one(tokens).ids
        holder.settle()

        def ask(how: str, **kv: Any) -> int:
            got = asker.one(tokens, **kv)
            assert got.ids == right, f"{how}: other tokens"
            found[how].append(got.ttft_s or 0.0)
            spent[how].append(got.ttft_cpu_s or 0.0)
            return got.cached

        for turn in range(rounds + 1):
            if turn < 3:
                assert ask("cold", kv=SKIP) == 0
            asker.settle()
            asker.forget(connector=True)
            cached = ask("peer")
            asker.settle()
            assert cached == ask("own") > TOKENS - 64, f"{cached} tokens of the other engine's"
        came = asker.settle()["workers"][0]
    seconds, cpu = ({how: a[1:] for how, a in each.items()} for each in (found, spent))
    return {"seconds": seconds, "cpu_s": cpu, "cached": cached, "at": came}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    given = parser.parse_args()
    if reason := harness.why_not():
        sys.exit(reason)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=ROOT / "benchmarks") as folder:
        run = first_tokens(Path(folder), given.rounds)
    print(f"{TOKENS} tokens, SmolLM2-135M, load {load:.2f}   TTFT s: median (least, most); CPU s")
    middle = {how: statistics.median(each) for how, each in run["seconds"].items()}
    for how, each in run["seconds"].items():
        print(f"  {how:<6} {middle[how]:8.3f} ({min(each):.3f}, {max(each):.3f})", end="")
        print(f" {statistics.median(run['cpu_s'][how]):8.3f}")
    for of, bar in BARS.items():
        print(f"  peer / {of}: {middle['peer'] / middle[of]:.3f} (bar {bar})")
    pairs = zip(run["seconds"]["peer"], run["seconds"]["own"], strict=True)
    ratio = statistics.median(p / o for p, o in pairs)
    print(f"  peer / own, median of the rounds' own: {ratio:.3f}")
    if given.json is not None:
        given.json.write_text(json.dumps({"load": load, **run}, indent=1) + "\n")


if __name__ == "__main__":
    main()
