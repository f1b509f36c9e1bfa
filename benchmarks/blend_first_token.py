"""Seconds to the first token behind 8 passages of 256 tokens, blended and computed whole.

    OMP_NUM_THREADS=1 python benchmarks/blend_first_token.py [--rounds 3]

SmolLM2 in float32 on the CPU, by transformers. A blend turns K, chooses, computes what was chosen,
and reads the question; CPU seconds, medians over rounds, beside computing everything in the same
round. Bars: `heads 16` <= 0.09 of it, the default <= 0.15.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from tierloom.adapters.quality.blend_arms import selective_of
from tierloom.adapters.quality.blend_sets import prompts
from tierloom.adapters.quality.subject import load_subject
from tierloom.adapters.transformers.model import with_cache
from tierloom.stages.blend.budget import BlendOptions
from tierloom.stages.blend.policies import Amount, Patchwork, choose
from tierloom.stages.kv.text import Excerpt, Run

if TYPE_CHECKING:
    from collections.abc import Callable

PASSAGES, TOKENS = 8, 256


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    subject, options = load_subject("smollm2"), BlendOptions()
    model, selective = subject.model, selective_of(subject)
    first, second = list(prompts("rag", subject.encode, judging=False))[:2]
    passages = [p.ids for p in (*first.pieces, *second.pieces)][:PASSAGES]
    begin = first.exact
    context = torch.tensor(begin + [i for p in passages for i in p])
    question = torch.tensor(first.suffix[: first.asked])
    n, start = len(context), len(begin)
    runs = [
        Run((Excerpt(start + TOKENS * i, TOKENS, bytes(32), 0, start),), seam=True)
        for i in range(PASSAGES)
    ]
    work = Patchwork(n, start, runs)
    size = (1, subject.shape.heads, n, subject.shape.dim)
    keys, values = [
        [torch.randn(size) for _ in range(subject.shape.layers)]
        for _ in range(2)
    ]  # fmt: skip
    shift = torch.arange(n)

    def whole() -> None:
        model(input_ids=torch.cat([context, question])[None], logits_to_keep=1)

    def blend(policy: str, amount: Amount) -> Callable[[], None]:
        def once() -> None:
            turned, placed = selective.turned(keys, shift), [v.clone() for v in values]
            scores = selective.scores(question, turned, placed) if policy == "probe" else None
            mask = choose(policy, work, amount, scores)
            cache = selective.recompute(context, mask, turned, placed)
            at = torch.arange(n, n + len(question))[None]
            model(
                input_ids=question[None], position_ids=at, logits_to_keep=1,
                **with_cache(model, cache),
            )  # fmt: skip

        return once

    default = Amount(options.heads, options.share, options.ceiling, len(question))
    subjects = {
        "everything computed": whole,
        "nothing recomputed": blend("none", default),
        "heads 16": blend("heads", Amount(16, 0.0)),
        f"{options.policy}, the default": blend(options.policy, default),
    }
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(given.rounds):
        for name, call in subjects.items():
            began = time.process_time()
            call()
            taken[name].append(time.process_time() - began)
    base = np.array(taken["everything computed"])
    print(f"{n} + {len(question)} tokens, {given.rounds} rounds; CPU seconds")
    for name, seconds in taken.items():
        share = statistics.median(np.array(seconds) / base)
        print(f"{name:24} {statistics.median(seconds):7.2f} s   {share:.3f}")


if __name__ == "__main__":
    main()
