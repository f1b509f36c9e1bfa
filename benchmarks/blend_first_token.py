"""Seconds to the first token after 8 passages of 256 tokens in a new order, blended and computed.

    OMP_NUM_THREADS=1 python benchmarks/blend_first_token.py [--rounds 3]

SmolLM2 in float32 on the CPU, `CachedModel.generate` of one token with the preset `blend`. CPU
seconds of the whole process, medians over rounds, beside computing everything in the same round.
Bars: `heads 16` <= 0.09 of it, the default <= 0.15. Chunks are cut from the prompt's beginning, so
how much is found depends on `--system`: what has no whole grain in its chunk is computed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tierloom.adapters.quality.blend_sets import prompts
from tierloom.adapters.quality.subject import load_subject
from tierloom.adapters.transformers import CachedModel

TOKENS, ORDER = 256, (5, 2, 7, 0, 3, 6, 1, 4)
ARMS: dict[str, dict[str, Any]] = {
    "nothing recomputed": {"policy": "none"},
    "heads 16": {"policy": "heads", "heads": 16},
    "the default": {},
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--system", type=int, default=100, help="tokens before the passages")
    given = parser.parse_args()
    torch.set_num_threads(1)
    subject = load_subject("smollm2")
    first, second = list(zip(range(2), prompts("rag", subject.encode, judging=False)))  # noqa: B905
    system, question = first[1].exact, first[1].suffix[: first[1].asked]
    system = (list(system) * given.system)[: given.system]
    passages = [p.ids for p in (*first[1].pieces, *second[1].pieces)][: len(ORDER)]

    def prompt(order: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor([system + [t for i in order for t in passages[i]] + question])

    asked, one = prompt(ORDER), {"max_new_tokens": 1, "do_sample": False}
    taken: dict[str, list[float]] = {name: [] for name in ("everything computed", *ARMS)}
    said: dict[str, Any] = {}
    with ExitStack() as closing:
        kept = {}
        for name, mend in ARMS.items():
            folder = closing.enter_context(tempfile.TemporaryDirectory())
            overrides = {f"graphs.retrieve.stages.mend.{k}": v for k, v in mend.items()}
            overrides |= {"tiers.warm.path": folder, "graphs.retrieve.deadline": "10 s"}
            overrides |= {"graphs.retrieve.stages.mend.worth": "always"}
            model = CachedModel(subject.model, config="blend", overrides=overrides)
            kept[name] = closing.enter_context(model)
            for order in (range(4), range(4, 8)):
                kept[name].generate(prompt(tuple(order)), **one)
                kept[name].flush()
            kept[name].generate(asked, blend=True, **one)  # proofs, once
            kept[name].flush()
        for _ in range(given.rounds):
            began = time.process_time()
            subject.model.generate(asked, attention_mask=torch.ones_like(asked), **one)
            taken["everything computed"].append(time.process_time() - began)
            for name, model in kept.items():
                began = time.process_time()
                model.generate(asked, blend=True, **one)
                taken[name].append(time.process_time() - began)
                said[name] = model.last
                model.flush()
    base = statistics.median(taken["everything computed"])
    print(f"{asked.shape[1]} tokens, {given.rounds} rounds; CPU seconds")
    for name, seconds in taken.items():
        last = said.get(name)
        computed = f", {last.computed_tokens} of {last.blended_tokens} computed" if last else ""
        middle = statistics.median(seconds)
        print(f"{name:20} {middle:7.2f} s   {middle / base:.3f}{computed}")


if __name__ == "__main__":
    main()
