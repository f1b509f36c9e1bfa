"""Prompts blended in a real, unpatched engine, against a selective forward in plain torch: run by
vLLM's own Python.

    python blend_cases.py FOLDER LIST

Prints the names of the cases of a list that held.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
from blending import ASK, COLD, SYSTEM, A, B, Blending, C, blending, check_rows, run
from harness import prompt

KEPT = [*SYSTEM, *A, *B, *C, *prompt(20, 7)]
ASKED = [*SYSTEM, *C, *A, *B, *prompt(40, 8)]
SMALL: dict[str, Any] = {"max_num_batched_tokens": 64}
MOVED = [(64, KEPT, 256, 96), (160, KEPT, 64, 192)]


def passages_in_a_new_order_are_what_a_selective_forward_gives() -> None:
    for policy in ("heads", "none", "probe"):
        with blending(policy, **(SMALL if policy == "probe" else {})) as engine:
            engine.keep(KEPT)
            name = engine.driver.add(ASKED, kv=ASK)
            chosen = check_rows(engine, name, ASKED, MOVED)
            heads = [*range(64, 72), *range(160, 168)] if policy != "none" else []
            tail = list(range(352, 384))
            if policy == "probe":
                assert set(heads + tail) < set(chosen)
                assert len(chosen) - len(tail) <= 0.12 * 288
                assert [o.what for o in engine.orders].count("probe") == 1
            else:
                assert chosen == heads + tail, chosen
            engine.driver.finish()


def what_follows_is_exact_for_all_others() -> None:
    with blending() as engine:
        cold = engine.cold(ASKED)
        engine.keep(KEPT)
        engine.core.scheduler.reset_prefix_cache()
        for _ in range(2):  # the same prompt twice
            engine.driver.generate([{"tokens": ASKED, "kv": ASK}])
            engine.driver.settle()
        found = plainly(engine)
        assert found["ids"] == cold
        assert found["cached"] == 64


def plainly(engine: Blending) -> Any:
    return engine.driver.generate([{"tokens": ASKED, "kv": {"tierloom.skip_save": True}}])[0]


def all_is_found_in_another_order_up_to_the_last_block() -> None:
    """Nothing is in front and nothing behind: the last token is vLLM's to compute."""
    with blending("none") as engine:
        engine.keep([*A, *B, *C])
        ids = [*C, *A, *B]
        name = engine.driver.add(ids, kv=ASK)
        chosen = check_rows(engine, name, ids, [(0, [*A, *B, *C], 192, 96), (96, [*A, *B], 0, 192)])
        assert chosen == []
        engine.driver.finish()


def several_blended_and_a_plain_one_run_together() -> None:
    """In slices, since the plain one takes most of each step. The questions are too short to be
    kept, or they would be found when they are asked again."""
    asked = [ASKED, [*SYSTEM, *B, *A, *prompt(50, 9)], [*SYSTEM, *A, *C, *prompt(40, 3)]]
    for policy, how in (("heads", {}), ("probe", SMALL)):
        with blending(policy, **how) as engine:
            cold = engine.cold(prompt(900, 5))
            engine.keep(KEPT)
            engine.core.scheduler.reset_prefix_cache()
            alone = [engine.driver.generate([{"tokens": i, "kv": ASK}])[0] for i in asked]
            engine.core.scheduler.reset_prefix_cache()
            names = [engine.driver.add(i, kv=ASK) for i in asked]
            names.append(engine.driver.add(prompt(900, 5), kv=COLD))
            found = engine.driver.finish(names)
            assert [f["ids"] for f in found] == [*(a["ids"] for a in alone), cold]
            assert [f["cached"] for f in found] == [*(a["cached"] for a in alone), 0]


def an_aborted_one_gives_its_blocks_back() -> None:
    """Before, in and after its repair."""
    with blending("probe", **SMALL) as engine:
        engine.keep(KEPT)
        for steps in range(12):
            engine.core.scheduler.reset_prefix_cache()
            name = engine.driver.add(ASKED, kv=ASK)
            engine.driver.step(steps)
            engine.driver.abort([name])
            engine.driver.finish([name])
            state = engine.driver.settle()
            assert state["free_blocks"] == state["blocks"], steps
            assert len(engine.side.blends._blends) == 0
        assert {o.what for o in engine.orders} >= {"probe", "compute", "end"}, engine.orders
        name = engine.driver.add(ASKED, kv=ASK)
        check_rows(engine, name, ASKED, MOVED)
        engine.driver.finish()


def a_repair_that_goes_wrong_is_computed_by_the_engine() -> None:
    """And the second one ends blending."""
    with blending("heads", alone=True) as engine:
        cold = engine.cold(ASKED)
        engine.keep(KEPT)
        engine.driver.generate([{"tokens": ASKED, "kv": ASK}])

        def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("broken")

        engine.blends._repair.forward = broken
        for fault in (1, 2):
            engine.driver.settle()
            engine.core.scheduler.reset_prefix_cache()
            assert not engine.side.blends.off
            found = engine.driver.generate([{"tokens": ASKED, "kv": ASK}])[0]
            assert found["ids"] == cold, fault
        assert engine.side.blends.off
        engine.core.scheduler.reset_prefix_cache()
        orders = len(engine.orders)
        assert engine.driver.generate([{"tokens": ASKED, "kv": ASK}])[0]["ids"] == cold
        assert len(engine.orders) == orders


def what_fails_its_proofs_is_served_exactly() -> None:
    from tierloom.adapters.vllm.worker import blended_loads

    with blending("heads", alone=True) as engine:
        cold = engine.cold(ASKED)
        engine.keep(KEPT)
        engine.core.scheduler.reset_prefix_cache()
        usual, blended_loads.prove = blended_loads.prove, lambda *_: "not as we turn it"
        try:
            found = engine.driver.generate([{"tokens": ASKED, "kv": ASK}])[0]
        finally:
            blended_loads.prove = usual
        assert found["ids"] == cold
        assert engine.side.blends.off == "not as we turn it"
        assert [o.what for o in engine.orders] == ["prove", "fail"]


def a_damaged_object_is_computed() -> None:
    with blending("none", alone=True) as engine:
        engine.keep(KEPT)
        gone = engine.side.texts.find  # what it finds is deleted before it is read

        def found(*given: Any, **how: Any) -> Any:
            runs = gone(*given, **how)
            engine.pipeline.pipeline.clear()
            return runs

        engine.core.scheduler.reset_prefix_cache()
        engine.side.texts.find = found
        cold = plainly(engine)["ids"]
        engine.core.scheduler.reset_prefix_cache()
        assert engine.driver.generate([{"tokens": ASKED, "kv": ASK}])[0]["ids"] == cold
        computed = [o.stretches for o in engine.orders if o.what == "compute"]
        assert computed == [[(0, 256)], [(256, 384)]]


CASES = [
    all_is_found_in_another_order_up_to_the_last_block,
    what_follows_is_exact_for_all_others,
    several_blended_and_a_plain_one_run_together,
    passages_in_a_new_order_are_what_a_selective_forward_gives,
    an_aborted_one_gives_its_blocks_back,
    a_repair_that_goes_wrong_is_computed_by_the_engine,
    what_fails_its_proofs_is_served_exactly,
    a_damaged_object_is_computed,
]

if __name__ == "__main__":
    run(globals()[sys.argv[2]])
