"""What is said of blends, and of what is not blended: run by vLLM's own Python.

    python said_cases.py FOLDER LIST

Prints the names of the cases of a list that held.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
from blending import ASK, FOLDER, SYSTEM, A, B, Blending, C, blending, models, run
from harness import prompt

KEPT = [*SYSTEM, *A, *B, *C, *prompt(20, 7)]
ASKED = [*SYSTEM, *C, *A, *B, *prompt(40, 8)]
NUMBERS = ("blends", "blend_exact_tokens", "blend_tokens", "blend_computed_tokens", "load_tokens")


@contextmanager
def heard() -> Iterator[list[str]]:
    """What the connector says meanwhile."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("tierloom.vllm").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("tierloom.vllm").removeHandler(handler)


def counted(engine: Blending) -> dict[str, float]:
    now = engine.driver.metrics()
    return {name: now.get(f"vllm:tierloom_{name}", 0.0) for name in NUMBERS}


def tokens_and_seconds_of_a_blend_are_counted_and_logged() -> None:
    with blending("probe") as engine:
        engine.keep(KEPT)
        engine.core.scheduler.reset_prefix_cache()
        before = counted(engine)
        with heard() as said:
            engine.driver.generate([{"tokens": ASKED, "kv": ASK}])
            engine.driver.settle()
        found = {name: n - before[name] for name, n in counted(engine).items()}
        orders = [o for o in engine.orders if o.what in {"compute", "probe"}]
        computed = {i for o in orders for s in o.stretches for i in range(*s)}
        assert [found[name] for name in NUMBERS] == [1, 64, 288, len(computed), 384 - len(computed)]
        assert "vllm:tierloom_blend_seconds" in engine.driver.metrics()  # shown in whole ones
        line = next(line for line in said if "blended" in line)
        seconds = re.fullmatch(
            r"request \S+: 64 tokens exact, 288 blended, loaded in (\S+) s; "
            rf"{len(computed)} computed in (\S+) s, (\d+)% of attention fell on them", line,
        )  # fmt: skip
        assert seconds, line
        assert all(float(n) > 0 for n in seconds.groups()), line


def who_asks_and_what_it_says_decides() -> None:
    """`ask` and `on`, true, false, nothing and nonsense; nonsense is neither loaded nor saved."""
    for how, blended in (("on", [True, False, True, False]), ("ask", [True, False, False, False])):
        with blending("heads", extra={"tierloom.blend": how}) as engine:
            cold = engine.cold(ASKED)
            engine.keep(KEPT)
            for kv, wanted in zip((True, False, None, "yes"), blended, strict=True):
                engine.driver.settle()
                engine.core.scheduler.reset_prefix_cache()
                engine.orders.clear()
                with heard() as said:
                    own = {} if kv is None else {"tierloom.blend": kv}
                    own["tierloom.skip_save"] = True
                    found = engine.driver.generate([{"tokens": ASKED, "kv": own}])[0]
                assert bool(engine.orders) == wanted, (how, kv)
                assert wanted or found["ids"] == cold
                nonsense = any("tierloom.blend wants true or false, got 'yes'" in s for s in said)
                assert nonsense == (kv == "yes")
                assert kv != "yes" or found["cached"] == 0


def whoever_wants_its_prompt_computed_is_not_blended() -> None:
    with blending("heads", extra={"tierloom.blend": "ask"}) as engine:
        cold = engine.cold(ASKED)
        engine.keep(KEPT)
        engine.core.scheduler.reset_prefix_cache()
        with heard() as said:
            asked = {"tokens": ASKED, "kv": ASK, "prompt_logprobs": 1}
            assert engine.driver.generate([asked])[0]["ids"] == cold
        assert not engine.orders
        assert sum("is not blended: it wants its prompt computed" in s for s in said) == 1


def engines_that_cannot_be_repaired_say_why_and_serve_exactly() -> None:
    gemma = str(models.gemma(FOLDER / "gemma"))
    for why, options in {
        "adapters (LoRA) are on": {"enable_lora": True, "max_lora_rank": 8},
        "with embeddings": {"enable_prompt_embeds": True},
        "torch.uint8 cache is not supported": {"kv_cache_dtype": "fp8_e5m2"},  # nor is it kept
        "several KV cache groups": {"model": gemma},
    }.items():
        with heard() as said, blending("heads", alone=True, **options) as engine:
            cold = engine.cold(ASKED)
            engine.keep(KEPT)
            engine.core.scheduler.reset_prefix_cache()
            found = engine.driver.generate([{"tokens": ASKED, "kv": ASK}])[0]
            assert found["ids"] == cold, why
            assert not engine.orders, why
            assert sum(why in s for s in said) >= 1, (why, said)


def windows_in_one_group_are_blended() -> None:
    model = {"model": str(models.gemma(FOLDER / "gemma2")), "disable_hybrid_kv_cache_manager": True}
    with blending("heads", alone=True, **model) as engine:
        engine.keep(KEPT)
        engine.core.scheduler.reset_prefix_cache()
        assert engine.driver.generate([{"tokens": ASKED, "kv": ASK}])[0]["cached"] == 384
        assert [o.what for o in engine.orders][-1] == "end"
        assert not engine.side.blends.off


CASES = [
    who_asks_and_what_it_says_decides,
    whoever_wants_its_prompt_computed_is_not_blended,
    tokens_and_seconds_of_a_blend_are_counted_and_logged,
]
CAMPAIGN = [
    engines_that_cannot_be_repaired_say_why_and_serve_exactly,
    windows_in_one_group_are_blended,
]

if __name__ == "__main__":
    run(globals()[sys.argv[2]])
