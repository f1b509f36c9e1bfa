"""Blended prompts of several tensor-parallel ranks, each in a process of its own, and what becomes
of them when one rank fails: run by vLLM's own Python.

    python rank_cases.py FOLDER LIST

Prints the names of the cases of a list that held.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
from blending import ASK, FOLDER, SYSTEM, A, B, Blending, C, D, blending, models, run
from harness import prompt

KEPT = [*SYSTEM, *A, *B, *C, *D[:20]]
PROMPTS = [[*SYSTEM, *p, *q, *r, *prompt(40 + i, 60 + i)]
           for i, (p, q, r) in enumerate([(C, A, B), (B, C, A), (B, A, C), (A, C, B)])]  # fmt: skip


@functools.cache
def six_heads() -> str:
    """For three ranks: 6 query and 3 KV heads, and all widths three times a power of two."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=576, hidden_size=192, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=3, head_dim=32, max_position_embeddings=8192,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return str(models._write(FOLDER / "six", LlamaForCausalLM, config, seed=0))


def engine(policy: str, ranks: int) -> Any:
    return blending(policy, alone=True, model=six_heads(), tensor_parallel_size=ranks)


def answers(engine: Blending) -> list[list[int]]:
    """Two by two; vLLM's own cache is emptied before each, or what was said before would count."""
    out = []
    for first in (0, 2):
        engine.driver.settle()
        engine.core.scheduler.reset_prefix_cache()
        asked = [{"tokens": ids, "kv": ASK} for ids in PROMPTS[first : first + 2]]
        found = engine.driver.generate(asked)
        assert all(f["cached"] > 300 for f in found), found
        out += [f["ids"] for f in found]
    engine.driver.settle()
    return out


def computed(engine: Blending) -> dict[str, set[int]]:
    """Tokens that repairs computed, by request; in which slices, time decides."""
    out: dict[str, set[int]] = {}
    for order in engine.orders:
        tokens = (i for s in order.stretches for i in range(*s))
        out.setdefault(order.request.split("-")[0], set()).update(tokens)
    return out


def three_ranks_say_what_one_does() -> None:
    for policy in ("heads", "probe"):
        said, tokens = [], []
        for ranks in (1, 3):
            with engine(policy, ranks) as one:
                one.keep(KEPT)
                said.append(answers(one))
                tokens.append(computed(one))
        assert said[0] == said[1]
        assert tokens[0] == tokens[1]


def on_rank(worker: Any, rank: int, how: str) -> None:
    """Runs in each worker's process: break one, until `mended`."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    from vllm.distributed.parallel_state import get_tp_group

    from tierloom.adapters.vllm.repair import probe
    from tierloom.adapters.vllm.repair.forward import Repair
    from tierloom.pipeline.pipeline import Pipeline

    if get_tp_group().rank_in_group != rank:
        return
    broken = {"load": (Pipeline, "retrieve"), "metadata": (Repair, "_metadata"),
              "scores": (probe, "_shares"), "memory": (probe, "Rows")}  # fmt: skip
    if how == "lost":
        get_kv_transfer_group().worker.pipelines[0].pipeline.clear()
        return
    owner, name = broken[how]
    usual = getattr(owner, name)

    def fails(*_: Any, **__: Any) -> Any:
        setattr(owner, name, usual)
        raise MemoryError(how)

    setattr(owner, name, fails)


def one_rank_fails_and_all_tokens_are_right() -> None:
    """Before its rows are placed, or before and behind a call of the model. Ranks stay in step:
    what follows is blended again."""
    with engine("probe", 3) as one:
        cold = [one.cold(ids) for ids in PROMPTS]
        one.keep(KEPT)
        right = answers(one)
        for how in ("lost", "load", "metadata", "scores", "memory"):
            one.empty()
            one.side.blends._faults.clear()
            one.keep(KEPT)
            one.core.scheduler.reset_prefix_cache()
            one.driver._llm.collective_rpc(on_rank, args=(1, how))
            found = one.driver.generate([{"tokens": PROMPTS[0], "kv": ASK}])[0]
            assert found["ids"] == cold[0], how
            print(how, len(one.side.blends._faults), file=sys.stderr)
            assert len(one.side.blends._faults) == (how not in {"lost", "load"}), how
            assert not one.side.blends.off
            one.empty()
            one.keep(KEPT)
            assert answers(one) == right, how


def a_rank_that_cannot_prove_turns_blending_off() -> None:
    with engine("heads", 3) as one:
        cold = one.cold(PROMPTS[0])
        one.keep(KEPT)
        one.core.scheduler.reset_prefix_cache()
        one.driver._llm.collective_rpc(on_rank, args=(1, "metadata"))
        assert one.driver.generate([{"tokens": PROMPTS[0], "kv": ASK}])[0]["ids"] == cold
        assert "the proofs went wrong" in one.side.blends.off
        one.driver.settle()
        one.core.scheduler.reset_prefix_cache()
        assert one.driver.generate([{"tokens": PROMPTS[0], "kv": ASK}])[0]["ids"] == cold


def compiled_and_eager_say_the_same() -> None:
    for policy in ("heads", "probe"):
        said, tokens = [], []
        for eager in (True, False):
            with blending(policy, alone=True, enforce_eager=eager) as one:
                one.keep(KEPT)
                said.append(answers(one))
                tokens.append(computed(one))
                assert not one.side.blends.off
        assert said[0] == said[1]
        assert tokens[0] == tokens[1]


CAMPAIGN = [
    three_ranks_say_what_one_does,
    one_rank_fails_and_all_tokens_are_right,
    a_rank_that_cannot_prove_turns_blending_off,
]
COMPILED = [compiled_and_eager_say_the_same]

if __name__ == "__main__":
    run(globals()[sys.argv[2]])
