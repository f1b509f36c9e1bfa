"""Runs worlds of `sim.py`: every order of hooks, and random engines. Run by vLLM's Python.

    .venv-vllm/bin/python tests/adapters/vllm/sides/sim_run.py MODEL orders [SEEDS [EACH]]
    .venv-vllm/bin/python tests/adapters/vllm/sides/sim_run.py MODEL positions CASES [SEED]

Prints one line of JSON: what was run, and what was wrong.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import logging
import os
import random
import sys
import time
from typing import Any

import vllm
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.request import RequestStatus

sys.path.insert(0, __file__.rsplit("/", 1)[0])
import sim
from sim_stage import (
    V1,
    V1_SPEC,
    V1_SPEC_STAGE,
    V1_ZERO,
    V2,
    V2_GRAPH,
    V2_SPEC,
    V2_SPEC_33,
    V2_ZERO,
    Case,
)

WAITS = RequestStatus.WAITING_FOR_STREAMING_REQ
CONFIGS: dict[str, Any] = {}


def config(model: str, drafter: str) -> Any:
    """A VllmConfig of its own; each kind is made once."""
    os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)  # for which a config asks for Triton
    if drafter not in CONFIGS:
        speculative = {
            "ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
            "model": {"method": "draft_model", "model": model, "num_speculative_tokens": 3},
        }
        CONFIGS[drafter] = EngineArgs(
            model=model, load_format="dummy", dtype="float32", block_size=32, max_model_len=4096,
            max_num_batched_tokens=256, max_num_seqs=6, skip_tokenizer_init=True,
            enforce_eager=True, kv_cache_memory_bytes=64 << 20, async_scheduling=False,
            speculative_config=speculative.get(drafter),
            kv_transfer_config=KVTransferConfig(
                kv_connector="TierloomConnector", kv_role="kv_both",
                kv_load_failure_policy="recompute",
            ),
        ).create_engine_config()  # fmt: skip
    return copy.deepcopy(CONFIGS[drafter])


def prompts(rng: random.Random, count: int, longest: int) -> list[list[int]]:
    """Prompts that share prefixes which end anywhere."""
    out: list[list[int]] = []
    for _ in range(count):
        shared = rng.choice(out)[: rng.randint(0, longest)] if out and rng.random() < 0.6 else []
        length = rng.randint(1, longest)
        fresh = [rng.randrange(sim.VOCAB) for _ in range(max(1, length - len(shared)))]
        out.append((shared + fresh)[:longest])
    return out


def play(model: str, case: Case, seed: int, *, requests: int = 6, longest: int = 500) -> Any:
    """Two rounds of requests, given up, preempted and continued at random. Raises `Wrong`."""
    rng = random.Random(seed)
    world = sim.World(case, config(model, case.drafter), {}, seed)
    said: dict[tuple[int, ...], list[int]] = {}
    asked: dict[str, tuple[int, ...]] = {}
    count = hits = 0
    try:
        history = prompts(rng, requests, longest)
        for turn in range(2):
            waiting = [(f"{turn}-{i}", p) for i, p in enumerate(history)]
            rng.shuffle(waiting)
            given_up: set[str] = set()
            while waiting or world.scheduler.has_requests():
                if waiting and rng.random() < 0.4:
                    name, prompt = waiting.pop()
                    asked[name] = tuple(prompt)
                    world.add(name, prompt, rng.randint(1, 40))
                    count += 1
                if rng.random() < 0.03 and (running := list(world.scheduler.requests)):
                    given_up.add(name := rng.choice(running))
                    world.abort(name)
                if rng.random() < 0.03:
                    with contextlib.suppress(RuntimeError):  # of vLLM's, where blocks are held
                        world.preempt()
                world.step()
            world.until_idle()
            for name, prompt in asked.items():  # a shorter answer begins the longer one
                if name in given_up or name not in world.said:
                    continue
                answer, known = world.said[name], said.setdefault(prompt, [])
                least = min(len(answer), len(known))
                assert answer[:least] == known[:least], (name, case)
                if len(answer) > len(known):
                    said[prompt] = answer
            # the next round: the same prompts, some of them with what was said, and more
            more = [7, 8, 9, rng.randrange(9)]
            history = [
                p if rng.random() < 0.5 else p + said.get(tuple(p), []) + more for p in history
            ]
            asked.clear()
        for stage in world.stages:
            taken = stage.connector.worker.transfer_log.stats.data
            hits += taken.get("load_tokens", 0)
        leaks = world.leaks()
        assert not leaks, (leaks, case)
        return count, hits, world.read_late, world.steps
    finally:
        world.close()


def talk(model: str, case: Case, seed: int) -> Any:
    """Sessions that get their input piece by piece; then the same text at once, and other text
    behind the same beginning."""
    rng = random.Random(seed)
    world = sim.World(case, config(model, case.drafter), {}, seed)
    try:
        texts, count = [], 0
        for i in range(3):
            name = f"s{i}"
            for _ in range(4):
                piece = [rng.randrange(sim.VOCAB) for _ in range(rng.randint(1, 150))]
                world.add(name, piece, rng.randint(1, 40), session=True)
                while world.scheduler.requests[name].status != WAITS:
                    world.step()
                texts.append(list(world.tokens[name]))
                count += 1
            world.add(name, [], 1)
            world.until_idle()
        world.sleep()
        for i, text in enumerate(texts):
            for j, tail in enumerate(([], [1, 2, 3])):
                world.add(f"t{i}-{j}", text[: len(text) - 2 * j] + tail * 20, 3)
                world.until_idle()
                count += 1
        taken = [
            s.connector.worker.transfer_log.stats.data.get("load_tokens", 0) for s in world.stages
        ]
        assert not world.leaks(), (world.leaks(), case)
        return count, sum(taken), world.read_late, world.steps
    finally:
        world.close()


def orders() -> list[Case]:
    """Every order of hooks that the runners of 0.32 and 0.33 can produce, in both save modes."""
    made = []
    for runners, drafter in [
        ((V1,), ""), ((V2,), ""), ((V2_GRAPH,), ""), ((V1, V1), ""),
        ((V1_ZERO,), ""), ((V2_ZERO,), ""),
        ((V1_SPEC,), "ngram"), ((V1_SPEC,), "model"),
        ((V1_SPEC_STAGE, V1_SPEC), "ngram"), ((V1_SPEC_STAGE, V1_SPEC), "model"),
        ((V2_SPEC,), "ngram"), ((V2_SPEC,), "model"),
        ((V2_SPEC_33,), "ngram"), ((V2_SPEC_33,), "model"),
    ]:  # fmt: skip
        for ahead, load, save, decode, prefix in itertools.product(
            (False, True), ("async", "layer"), ("step", "layer"), (True, False), (False, True)
        ):
            if load == "layer" and not all(r.layers for r in runners):
                continue  # vLLM is asked for piecewise graphs then
            made.append(
                Case(
                    runners=runners, drafter=drafter, ahead=ahead, load=load, save=save,
                    decode=decode, prefix=prefix, slow=0.02,
                )
            )  # fmt: skip
    return made


def anything(rng: random.Random) -> Case:
    """An engine of any sizes."""
    block = 16 * rng.choice([1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64])
    grain = rng.choice([16, 32, 48, 64])
    chunk = grain * rng.randint(1, max(1, 1024 // grain // rng.choice([1, 2, 4, 8])))
    runners, drafter = rng.choice([
        ((V1,), ""), ((V1,), ""), ((V2,), ""), ((V1_SPEC,), "ngram"),
        ((V2_SPEC_33,), "model"),
    ])  # fmt: skip
    return Case(
        runners=runners, drafter=drafter, ahead=rng.random() < 0.3, load=rng.choice(
            ["async", "layer"]), save=rng.choice(["step", "layer"]), decode=rng.random() < 0.7,
        block=block, chunk=chunk, grain=grain, dense=rng.random() < 0.5,
        order=rng.choice(["auto", "canonical"]), budget=rng.choice([64, 200, 320, 1000]),
        blocks=2 + max(3200, 4 * block) // block, prefix=rng.random() < 0.4,
    )  # fmt: skip


def main(model: str, what: str, *rest: str) -> None:
    numbers = [int(n) for n in rest]
    if what == "orders":
        seeds, each = [*numbers, 1, 1][:2]
        jobs = [(case, seed, 6, 500) for seed in range(seeds) for case in orders()[::each]]
    elif what == "sessions":
        # vLLM 0.32 itself goes on from KV of drafts that it cut off when a session's input came.
        old = vllm.__version__.startswith("0.32.")
        cases = [case for case in orders() if not (old and case.drafter)]
        jobs = [(case, 0, 0, 0) for case in cases[:: numbers[0]]]
    else:
        rng = random.Random(numbers[1] if len(numbers) > 1 else 0)
        jobs = [(anything(rng), rng.randrange(1 << 30), 8, 1500) for _ in range(numbers[0])]
    began = said = time.monotonic()
    total = dict.fromkeys(("engines", "requests", "hit_tokens", "steps", "read_late"), 0)
    wrong = []
    for at, (case, seed, requests, longest) in enumerate(jobs):
        if time.monotonic() - said > 5:
            said = time.monotonic()
            print(f"{at} of {len(jobs)}: {total}, {len(wrong)} wrong", file=sys.stderr, flush=True)
        try:
            if what == "sessions":
                count, hits, late, steps = talk(model, case, seed)
            else:
                count, hits, late, steps = play(
                    model, case, seed, requests=requests, longest=longest
                )
        except Exception as error:
            wrong.append(f"seed {seed}: {type(error).__name__}: {error}"[:600])
            print(wrong[-1], file=sys.stderr, flush=True)
            continue
        for name, n in zip(total, (1, count, hits, steps, late), strict=True):
            total[name] += n
    print("\nRESULT " + json.dumps({
        **total, "vllm": vllm.__version__,
        "wrong": wrong[:20], "wrongs": len(wrong), "seconds": round(time.monotonic() - began, 1)
    }))  # fmt: skip


if __name__ == "__main__":
    logging.getLogger("vllm").setLevel(logging.ERROR)
    main(*sys.argv[1:])
