"""What the cases share: a real, unpatched engine in this process that may blend, and what a
selective forward in plain torch makes of the same prompt.

Engines of the same options are one, emptied for each case that asks for it.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
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
from tierloom.adapters.vllm.scheduler.blend_orders import SLICE  # noqa: E402

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
            "enable_prefix_caching": True, "max_num_batched_tokens": 256, "max_model_len": 2048,
        }  # fmt: skip
        given = transfer("blend", **(extra | options.pop("extra", {})))
        self.driver.start(
            model=folder, kv_transfer_config=given, **(engine | options)
        )  # fmt: skip
        core = self.driver._core()
        self.core, self.side = core, core.scheduler.connector.scheduler
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        self.pipeline: Any = None
        self.blends: Any = None
        if has_kv_transfer_group():  # else the workers are other processes
            worker: Any = get_kv_transfer_group().worker  # type: ignore[attr-defined]
            self.pipeline = next(iter(worker.pipelines), None)
            self.blends = worker._blends
        self.orders: list[Any] = []
        self.over: list[tuple[int, Any]] = []
        """Steps of which repairs take more than vLLM's token budget leaves, and they need not."""
        given_out = self.side.blends.orders

        def noted(scheduled: int) -> list[Any]:
            self.orders += (orders := given_out(scheduled))
            made = [sum(b - a for a, b in o.stretches) for o in orders if o.stretches]
            budget = core.scheduler.max_num_scheduled_tokens
            if len(made) > 1 and sum(made) > max(budget - scheduled, SLICE):
                self.over.append((scheduled, orders))
            return orders

        self.side.blends.orders = noted

    def empty(self) -> None:
        """Forget all that was asked, kept and ordered."""
        self.driver.settle()
        assert self.driver.reset(connector=True)
        self.driver.settle()
        self.orders.clear()

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
        slots = self.blends._made().slots(blocks)[:tokens]
        layers = len(self.blends.model.layers)
        with Rows(self.pipeline.group, tokens, layers) as rows:
            return rows.read(slots, range(layers))

    def computed(self, name: str) -> list[int]:
        """Tokens computed for a request since it was placed, or since it was probed."""
        mine = [o for o in self.orders if o.request.startswith(name)]
        probes = [i for i, o in enumerate(mine) if o.what == "probe"]
        mine = mine[probes[-1] + 1 :] if probes else mine
        return [i for o in mine if o.what == "compute" for s in o.stretches for i in range(*s)]

    def first_token(self, name: str) -> tuple[list[int], int]:
        """Step until a request has a token more: its blocks, and tokens that were not vLLM's to
        do."""
        blocks: list[int] = []
        had = len(self.driver._open[name].ids)
        while len(self.driver._open[name].ids) == had:
            self.driver.step()
            blocks = next((b for n, b in self.blocks().items() if n.startswith(name)), blocks)
        return blocks, self.driver._open[name].cached or 0


_running: list[tuple[str, Blending]] = []


@contextmanager
def blending(policy: str = "heads", *, alone: bool = False, **options: Any) -> Iterator[Blending]:
    """An engine of these options: the one that runs, emptied, or a new one. `alone`: a new one
    that no other case gets, for what is changed in it."""
    key = repr((policy, options))
    while _running and (alone or _running[0][0] != key):
        _running.pop()[1].driver.stop()
    if _running:
        _running[0][1].empty()
    else:
        _running.append((key, Blending(policy, **options)))
    try:
        yield _running[0][1]
        assert not _running[0][1].over
    finally:
        if alone or sys.exc_info()[0] is not None:
            _running.pop()[1].driver.stop()


def run(cases: Sequence[Callable[[], None]]) -> None:
    """Each case, and its name once it held."""
    for case in cases:
        case()
        print(case.__name__, flush=True)
    while _running:
        _running.pop()[1].driver.stop()


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


def check_rows(
    engine: Blending, name: str, ids: list[int], kept: Any, there: int | None = None
) -> list[int]:
    """All rows of a prompt are what the cases say; the tokens that were computed over text of
    others. `there`: tokens that vLLM did not compute, where it does not say so."""
    blocks, cached = engine.first_token(name)
    there, chosen = cached if there is None else there, engine.computed(name)
    wanted = selective(ids, kept, [*chosen, *range(there, len(ids))])
    off = (engine.rows(blocks, len(ids)) - wanted).abs().max()
    print(f"{name}: {there} of {len(ids)} tokens, {len(chosen)} computed, rows off by {off:.2g}",
          file=sys.stderr)  # fmt: skip
    assert off <= NEAR, off
    exact = selective(ids, [], [0])
    assert (wanted - exact)[:, :, :there].abs().max() > 10 * NEAR  # the case is one
    return chosen
