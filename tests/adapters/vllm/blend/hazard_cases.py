"""What may come between a blended prompt and its first token: run by vLLM's own Python.

    python hazard_cases.py FOLDER LIST

Prints the names of the cases of a list that held.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
from blending import ASK, COLD, FOLDER, SYSTEM, A, B, Blending, C, D, blending, check_rows, run
from harness import prompt

KEPT = [*SYSTEM, *A, *B, *C, *prompt(20, 7)]
QUESTION = prompt(40, 8)
ASKED = [*SYSTEM, *C, *A, *B, *QUESTION]
MOVED = [(64, KEPT, 256, 96), (160, KEPT, 64, 192)]


def kept(engine: Blending, *prompts: list[int]) -> None:
    engine.keep(*(prompts or (KEPT,)))
    engine.core.scheduler.reset_prefix_cache()


def answer(engine: Blending, ids: list[int], kv: Any = ASK, **how: Any) -> Any:
    found = engine.driver.generate([{"tokens": ids, "kv": kv, **how}])[0]
    engine.driver.settle()
    return found


def still_exact(engine: Blending, ids: list[int], cold: list[int]) -> None:
    """A plain request for the same prompt gets nothing of it."""
    assert answer(engine, ids, {"tierloom.skip_save": True})["ids"] == cold


def one_that_is_preempted_is_blended_again() -> None:
    """Before its load is sent out it waits, in its repair it waits for vLLM: neither can be
    preempted. Afterwards it is another prompt, which ends with what was said."""
    with blending() as engine:
        cold = engine.cold(ASKED)
        kept(engine)
        name = engine.driver.add(ASKED, kv=ASK, max_tokens=12)
        check_rows(engine, name, ASKED, MOVED)
        for more in (2, 4):
            engine.driver.step(more)
            said = list(engine.driver._open[name].ids)
            engine.core.scheduler.reset_prefix_cache(reset_running_requests=True)
            assert not engine.core.scheduler.running
            engine.orders.clear()
            ids = [*ASKED, *said]
            assert len(said) > more
            check_rows(engine, name, ids, MOVED, there=(len(ids) - 1) // 32 * 32)
        engine.driver.finish()
        engine.driver.settle()
        still_exact(engine, ASKED, cold)


def preempted_for_want_of_blocks_all_are_answered() -> None:
    """Also while others are repaired, and though a load lacks its blocks for a while."""
    blocks = {"kv_cache_memory_bytes": 27 * 32 * 2048, "max_model_len": 512}
    with blending("heads", alone=True, **blocks) as engine:
        cold = [engine.cold(ids)[:8] for ids in (ASKED, prompt(300, 5))]
        kept(engine)
        orders = [[*C, *A, *B], [*B, *C, *A], [*B, *A, *C], [*A, *C, *B]]
        prompts = [[*SYSTEM, *ids, *prompt(30 + i, 60 + i)] for i, ids in enumerate(orders)]
        names = [engine.driver.add(ids, kv=ASK, max_tokens=60) for ids in prompts]
        names.insert(2, engine.driver.add(prompt(300, 5), max_tokens=60))
        found = engine.driver.finish(names)
        assert engine.driver.metrics()["vllm:num_preemptions"] > 0
        assert found[2]["ids"][:8] == cold[1]
        assert all(len(f["ids"]) == 60 for f in found)
        state = engine.driver.settle()
        assert state["free_blocks"] == state["blocks"]
        assert not engine.side.blends.off
        still_exact(engine, ASKED, cold[0])


def a_long_tail_is_computed_in_chunks() -> None:
    with blending() as engine:
        kept(engine)
        ids = [*SYSTEM, *C, *A, *B, *prompt(700, 8)]
        name = engine.driver.add(ids, kv=ASK)
        check_rows(engine, name, ids, MOVED)
        assert engine.driver.finish()[0]["cached"] == 352


def what_lies_within_vllms_own_hit_stays_exact() -> None:
    """The hit ends within a run, which goes on behind it."""
    with blending() as engine:
        kept(engine)
        answer(engine, [*SYSTEM, *C, *A, *D[:8]], COLD)
        name = engine.driver.add(ASKED, kv=ASK)
        chosen = check_rows(engine, name, ASKED, [(256, KEPT, 160, 96)])
        assert min(chosen) >= 256
        engine.driver.finish()


def a_prefix_that_ends_within_a_block_is_exact_up_to_it() -> None:
    with blending() as engine:
        kept(engine)
        ids = [*SYSTEM[:48], *C, *A, *B, *QUESTION]
        name = engine.driver.add(ids, kv=ASK)
        chosen = check_rows(engine, name, ids, [(48, KEPT, 256, 96), (144, KEPT, 64, 192)])
        assert set(range(32, 56)) <= set(chosen)
        assert min(chosen) == 32
        engine.driver.finish()


def the_same_prompt_is_answered_the_same_twice() -> None:
    with blending() as engine:
        kept(engine)
        name = engine.driver.add(ASKED, kv=ASK)
        check_rows(engine, name, ASKED, MOVED)
        first = engine.driver.finish()[0]
        engine.driver.settle()
        name = engine.driver.add(ASKED, kv=ASK)
        check_rows(engine, name, ASKED, MOVED)
        again = engine.driver.finish()[0]
        assert (first["ids"], first["cached"]) == (again["ids"], again["cached"])


def special_tokens_alone_and_one_token_many_times_are_found() -> None:
    """Of the same text again and again it does not matter which is taken, only that it ends."""
    with blending() as engine:
        for only in ([1] * 256, [5] * 1400):
            engine.empty()
            ids = [*SYSTEM, *only[:700], *A, *QUESTION]
            cold = engine.cold(ids)
            kept(engine, [*C[:40], *only, *B], [*SYSTEM, *D, *A])
            found = answer(engine, ids)
            assert found["cached"] == (len(ids) - 1) // 32 * 32
            assert [o.what for o in engine.orders][-1] == "end"
            still_exact(engine, ids, cold)


def text_is_found_again_after_a_restart() -> None:
    """Also that which was computed over text of others: not by those who ask for a prefix."""
    folder = {"extra": {"tiers.warm.path": tempfile.mkdtemp(dir=FOLDER)}}
    ids = [*SYSTEM, *C, *A, *B, *prompt(100, 9)]
    with blending("heads", alone=True, **folder) as engine:
        cold = engine.cold(ids)
        kept(engine)
        answer(engine, ids)
    with blending("heads", alone=True, **folder) as engine:
        engine.driver.settle()
        still_exact(engine, ids, cold)
        engine.core.scheduler.reset_prefix_cache()
        name = engine.driver.add(ASKED, kv=ASK)
        check_rows(engine, name, ASKED, MOVED)
        engine.driver.finish()


CASES = [
    one_that_is_preempted_is_blended_again,
    a_long_tail_is_computed_in_chunks,
    what_lies_within_vllms_own_hit_stays_exact,
    a_prefix_that_ends_within_a_block_is_exact_up_to_it,
    the_same_prompt_is_answered_the_same_twice,
    special_tokens_alone_and_one_token_many_times_are_found,
    text_is_found_again_after_a_restart,
]
CAMPAIGN = [preempted_for_want_of_blocks_all_are_answered]

if __name__ == "__main__":
    run(globals()[sys.argv[2]])
