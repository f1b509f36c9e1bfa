"""Prompts blended in a real, unpatched engine, against a selective forward in plain torch: run by
vLLM's own Python.

    python blend_cases.py FOLDER LIST

Prints the names of the cases of a list that held.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent), str(HERE.parent / "repair"), str(HERE.parents[1])]
import models  # noqa: E402
from engine import Driver  # noqa: E402
from harness import prompt, transfer  # noqa: E402
from plain import Plain  # noqa: E402

from tierloom.adapters.vllm.repair.rows import Rows  # noqa: E402

FOLDER = Path(sys.argv[1])
NEAR = 1e-3
SYSTEM, A, B, C, D = prompt(64, 1), *(prompt(96, 10 + i) for i in range(4))
ASK, COLD = {"tierloom.blend": True}, {"tierloom.skip_load": True, "tierloom.skip_save": True}


@functools.cache
def plain() -> Plain:
    return Plain(models.llama(FOLDER / "llama"))


class Blending:
    """An engine that may blend, and what it ordered for each request."""

    def __init__(self, policy: str = "heads", model: str = "", **options: Any) -> None:
        folder, self.driver = model or str(FOLDER / "llama"), Driver()
        plain()
        mend = "graphs.retrieve.stages.mend."
        extra: dict[str, Any] = {
            "tierloom.blend": "ask",
            mend + "policy": policy,
            mend + "heads": 8,
        }
        extra |= {
            "tiers.warm.path": tempfile.mkdtemp(dir=FOLDER), "tiers.warm.capacity": "256 MiB",
            "tiers.warm.segment": "32 MiB",
        }  # fmt: skip
        engine: dict[str, Any] = {
            "enable_prefix_caching": True, "max_num_batched_tokens": 512, "max_model_len": 2048,
        }  # fmt: skip
        given = transfer("blend", **(extra | options.pop("extra", {})))
        self.driver.start(
            model=folder, kv_transfer_config=given, **(engine | options)
        )  # fmt: skip
        core = self.driver._core()
        self.core, self.side = core, core.scheduler.connector.scheduler
        self.worker = core.model_executor.driver_worker.worker
        self.orders: list[Any] = []
        given_out = self.side.blends.orders

        def noted(scheduled: int) -> list[Any]:
            self.orders += (orders := given_out(scheduled))
            return orders

        self.side.blends.orders = noted

    def keep(self, *prompts: list[int]) -> None:
        """Answer prompts one by one, and wait until they are kept."""
        for ids in prompts:
            self.driver.generate([{"tokens": ids, "max_tokens": 1}])
            self.driver.settle()

    def cold(self, ids: list[int]) -> list[int]:
        self.core.scheduler.reset_prefix_cache()
        out: list[int] = self.driver.generate([{"tokens": ids, "kv": COLD}])[0]["ids"]
        self.core.scheduler.reset_prefix_cache()
        return out

    def blocks(self) -> dict[str, list[int]]:
        """Blocks of each request that runs or waits."""
        manager = self.core.scheduler.kv_cache_manager
        return {name: list(manager.get_block_ids(name)[0]) for name in self.core.scheduler.requests}

    def rows(self, blocks: list[int], tokens: int) -> torch.Tensor:
        """[K and V, layers, tokens, heads, channels] in the engine's own memory."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        worker: Any = get_kv_transfer_group()
        blends = worker.worker._blends
        slots = blends._made().slots(blocks)[:tokens]
        layers = len(blends.model.layers)
        with Rows(worker.worker.pipelines[0].group, tokens, layers) as rows:
            return rows.read(slots, range(layers))

    def computed(self, name: str) -> list[int]:
        """Tokens computed for a request since it was placed, or since it was probed."""
        mine = [o for o in self.orders if o.request.startswith(name)]
        probes = [i for i, o in enumerate(mine) if o.what == "probe"]
        mine = mine[probes[-1] + 1 :] if probes else mine
        return [i for o in mine if o.what == "compute" for s in o.stretches for i in range(*s)]

    def first_token(self, name: str) -> tuple[list[int], int]:
        """Step until a request has a token: its blocks, and tokens that were not vLLM's to do."""
        blocks: list[int] = []
        while not self.driver._open[name].ids:
            blocks = next((b for n, b in self.blocks().items() if n.startswith(name)), blocks)
            self.driver.step()
        return blocks, self.driver._open[name].cached or 0


@contextmanager
def blending(policy: str = "heads", **options: Any) -> Iterator[Blending]:
    engine = Blending(policy, **options)
    try:
        yield engine
    finally:
        engine.driver.stop()


def selective(
    ids: list[int], kept: list[tuple[int, list[int], int, int]], chosen: list[int]
) -> torch.Tensor:
    """Rows of `ids` of which those of `kept` (first token, prompt, its first token, tokens) are
    turned to their place and `chosen` are computed over them."""
    model, n = plain(), len(ids)
    k, v = model.prefill(torch.tensor(ids))
    for at, other, first, tokens in kept:
        old_k, old_v = model.prefill(torch.tensor(other))
        shift = torch.full((tokens,), at - first)
        for i in range(model.layers):
            k[i][at : at + tokens] = model.turn(old_k[i][first : first + tokens], shift)
            v[i][at : at + tokens] = old_v[i][first : first + tokens]
    if chosen:
        model.repair(torch.tensor(ids), k, v, torch.tensor(chosen))
    assert n == len(k[0])
    return torch.stack([torch.stack(k), torch.stack(v)])


def check_rows(engine: Blending, name: str, ids: list[int], kept: Any) -> list[int]:
    blocks, there = engine.first_token(name)
    chosen = engine.computed(name)
    wanted = selective(ids, kept, chosen)[:, :, :there]
    off = (engine.rows(blocks, there) - wanted).abs().max()
    print(f"{name}: {there} of {len(ids)} tokens, {len(chosen)} computed, rows off by {off:.2g}",
          file=sys.stderr)  # fmt: skip
    assert off <= NEAR, off
    exact = selective(ids, [], [0])[:, :, :there]
    assert (wanted - exact).abs().max() > 10 * NEAR  # the case is one
    return chosen


KEPT = [*SYSTEM, *A, *B, *C, *prompt(20, 7)]
ASKED = [*SYSTEM, *C, *A, *B, *prompt(40, 8)]
MOVED = [(64, KEPT, 256, 96), (160, KEPT, 64, 192)]


def passages_in_a_new_order_are_what_a_selective_forward_gives() -> None:
    for policy in ("heads", "none", "probe"):
        with blending(policy) as engine:
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
            assert engine.orders[0].what == "prove"
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


def without_salt_they_would_not_be() -> None:
    with blending() as engine:
        engine.keep(KEPT)
        engine.core.scheduler.reset_prefix_cache()
        engine.side.blends.salt = lambda *_: None
        engine.driver.generate([{"tokens": ASKED, "kv": ASK}])
        engine.driver.settle()
        assert plainly(engine)["cached"] > 64


def all_is_found_in_another_order_up_to_the_last_block() -> None:
    """Nothing is in front and nothing behind: the last token is vLLM's to compute."""
    with blending("none") as engine:
        engine.keep([*A, *B, *C])
        ids = [*C, *A, *B]
        name = engine.driver.add(ids, kv=ASK)
        chosen = check_rows(engine, name, ids, [(0, [*A, *B, *C], 192, 96), (96, [*A, *B], 0, 192)])
        assert chosen == []
        engine.driver.finish()


def two_blended_and_a_plain_one_run_together() -> None:
    """In slices, since the plain ones take most of each step."""
    ids = [ASKED, [*SYSTEM, *B, *A, *prompt(70, 9)], prompt(900, 5)]
    with blending("heads", max_num_batched_tokens=256) as engine:
        cold = engine.cold(ids[2])
        alone = []
        for kept in (None, KEPT):
            if kept:
                engine.keep(kept)
                engine.core.scheduler.reset_prefix_cache()
                alone = [engine.driver.generate([{"tokens": i, "kv": ASK}])[0] for i in ids[:2]]
                engine.core.scheduler.reset_prefix_cache()
        names = [engine.driver.add(i, kv=ASK) for i in ids[:2]]
        names.append(engine.driver.add(ids[2], kv=COLD))
        found = engine.driver.finish(names)
        assert [f["ids"] for f in found] == [*(a["ids"] for a in alone), cold]
        assert all(f["cached"] >= 64 for f in found[:2])


def an_aborted_one_gives_its_blocks_back() -> None:
    """Before, in and after its repair."""
    with blending("probe", max_num_batched_tokens=64) as engine:
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
        assert {o.what for o in engine.orders} == {"prove", "probe", "compute", "end"}, (
            engine.orders
        )
        name = engine.driver.add(ASKED, kv=ASK)
        check_rows(engine, name, ASKED, MOVED)
        engine.driver.finish()


def a_repair_that_goes_wrong_is_computed_by_the_engine() -> None:
    """And the second one ends blending."""
    with blending() as engine:
        cold = engine.cold(ASKED)
        engine.keep(KEPT)
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        blends: Any = get_kv_transfer_group().worker._blends  # type: ignore[attr-defined]
        engine.driver.generate([{"tokens": ASKED, "kv": ASK}])

        def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("broken")

        blends._repair.forward = broken
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

    with blending() as engine:
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
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    with blending("none") as engine:
        engine.keep(KEPT)
        worker: Any = get_kv_transfer_group()
        hot = worker.worker.pipelines[0].pipeline.tiers["hot"]
        gone = engine.side.texts.find  # what it finds is deleted before it is read

        def found(*given: Any, **how: Any) -> Any:
            runs = gone(*given, **how)
            worker.worker.pipelines[0].pipeline.clear()
            return runs

        engine.core.scheduler.reset_prefix_cache()
        engine.side.texts.find = found
        cold = plainly(engine)["ids"]
        engine.core.scheduler.reset_prefix_cache()
        assert engine.driver.generate([{"tokens": ASKED, "kv": ASK}])[0]["ids"] == cold
        assert hot is not None
        computed = [o.stretches for o in engine.orders if o.what == "compute"]
        assert computed == [[(0, 384)]]


def a_first_token_costs_less_than_cold() -> None:
    """8 passages of 256 in a new order, SmolLM2: reported, not judged."""
    from tierloom.adapters.demo import smollm2

    system = prompt(128, 1, 49152)
    passages = [prompt(256, 10 + i, 49152) for i in range(8)]
    asked = [*system, *(t for i in (5, 2, 7, 0, 3, 6, 1, 4) for t in passages[i])]
    asked += prompt(60, 9, 49152)
    for policy in ("heads", "probe"):
        how: dict[str, Any] = {"kv_cache_memory_bytes": 512 << 20, "max_model_len": 4096}
        how |= {"max_num_batched_tokens": 4096, "model": str(smollm2.model_dir(progress=False))}
        sizes = {"tiers.hot.capacity": "512 MiB", "budget.arena": "256 MiB"}
        with blending(policy, extra=sizes, **how) as engine:
            for half in (passages[:4], passages[4:]):
                engine.keep([*system, *(t for p in half for t in p)])
            taken: dict[str, list[float]] = {"cold": [], "blended": []}
            for _ in range(4):
                for name, kv in (("cold", COLD), ("blended", ASK)):
                    engine.core.scheduler.reset_prefix_cache()
                    found = engine.driver.generate([{"tokens": asked, "kv": kv, "max_tokens": 1}])
                    engine.driver.settle()
                    taken[name].append(found[0]["ttft_cpu_s"])
            cold, mixed = (sorted(seconds[1:])[1] for seconds in taken.values())
            chosen = sum(b - a for o in engine.orders for a, b in o.stretches) // 4
            print(f"{policy}: {len(asked)} tokens, {chosen} computed; first token in {mixed:.2f} "
                  f"of {cold:.2f} CPU s: {mixed / cold:.3f}", file=sys.stderr)  # fmt: skip
            assert found[0]["cached"] > 2100


CAMPAIGN = [a_first_token_costs_less_than_cold]
CASES = [
    passages_in_a_new_order_are_what_a_selective_forward_gives,
    what_follows_is_exact_for_all_others,
    without_salt_they_would_not_be,
    all_is_found_in_another_order_up_to_the_last_block,
    two_blended_and_a_plain_one_run_together,
    an_aborted_one_gives_its_blocks_back,
    a_repair_that_goes_wrong_is_computed_by_the_engine,
    what_fails_its_proofs_is_served_exactly,
    a_damaged_object_is_computed,
]

if __name__ == "__main__":
    for case in globals()[sys.argv[2]]:
        case()
        print(case.__name__, flush=True)
