"""What a repair writes, in a real engine, against a selective forward in plain torch: run by vLLM's
own Python.

    python forward_cases.py FOLDER LIST

Prints the names of the cases of a list that held.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]
import models  # noqa: E402
from engines import Engine  # noqa: E402
from plain import KV, Plain  # noqa: E402

from tierloom.adapters.vllm.repair.engine_model import find_model  # noqa: E402
from tierloom.adapters.vllm.repair.forward import Repair, Stretch, cut  # noqa: E402
from tierloom.adapters.vllm.repair.probe import probe  # noqa: E402
from tierloom.stages.errors import InputError, LayoutError  # noqa: E402
from tierloom.stages.kv.layout_check import token  # noqa: E402

FOLDER = Path(sys.argv[1])
NEAR = 1e-3
N = 300


@functools.cache
def tiny() -> tuple[Engine, Plain]:
    """The engine of all cases, and its model in plain torch."""
    folder = models.llama(FOLDER / "llama")
    return Engine(folder), Plain(folder)


class Prompt:
    """A prompt whose loaded rows were captured behind other text, laid into an engine's blocks."""

    def __init__(self, engine: Engine, plain: Plain, seed: int, n: int = N) -> None:
        r = random.Random(seed)
        self.plain, self.n = plain, n
        self.group = engine.groups()[0]
        self.ids = torch.tensor([r.randrange(3, models.VOCAB) for _ in range(n)])
        blocks = range(1, self.group.layout.blocks // self.group.split)
        self.lie_in(r.sample(blocks, -(-n // self.group.block_tokens)))
        other = self.ids.clone()
        other[: n // 2] = other[: n // 2].flip(0)  # another prompt's first half: what is kept
        self.k, self.v = plain.prefill(other)

    def lie_in(self, blocks: Sequence[int]) -> None:
        size = self.group.block_tokens
        self.blocks = list(blocks)
        self.slots = [self.blocks[i // size] * size + i % size for i in range(self.n)]

    def place(self, *, without: list[Stretch] = []) -> None:  # noqa: B006
        """Write the loaded rows but those that are computed, which hold another number."""
        skip = {i for first, end in without for i in range(first, end)}
        for i, cache in enumerate(self.group.caches):
            for at in range(self.n):
                for part, rows in ((0, self.k[i]), (1, self.v[i])):
                    value = torch.tensor(555.0) if at in skip else rows[at]
                    token(self.group.layout, cache, part, self.slots[at]).copy_(value)

    def wanted(self, stretches: list[Stretch]) -> tuple[KV, KV]:
        k, v = [x.clone() for x in self.k], [x.clone() for x in self.v]
        chosen = torch.cat([torch.arange(*s) for s in stretches])
        self.plain.repair(self.ids, k, v, chosen)
        return k, v

    def off(self, k: KV, v: KV) -> float:
        """The largest difference of a number in the cache from those wanted."""
        worst = 0.0
        for i, cache in enumerate(self.group.caches):
            for part, rows in ((0, k[i]), (1, v[i])):
                found = torch.stack(
                    [token(self.group.layout, cache, part, s).clone() for s in self.slots]
                )
                worst = max(worst, float((found - rows).abs().max()))
        return worst


def choices(seed: int) -> list[list[Stretch]]:
    """None of them the other: single tokens, heads, a random mix, all, the end of a block."""
    r = random.Random(seed)
    mixed: list[Stretch] = []
    at = 0
    while len(mixed) < 7:
        first = at + r.randrange(0, 12)
        end = first + r.choice([1, 1, 2, 7, 20, 33])
        mixed.append((first, end))
        at = end + 1
    return [
        [(i, i + 1) for i in sorted(r.sample(range(1, N, 2), 8))],
        [(0, 16), (100, 116), (200, 216)],
        mixed,
        [(0, N)],
        [(31, 33), (64, 65), (95, 128), (N - 1, N)],
    ]


def rows_equal_a_selective_forward_and_all_others_stay() -> None:
    engine, plain = tiny()
    repair = engine.repair()
    for case, stretches in enumerate(s for seed in (1, 2) for s in choices(seed)):
        engine.noise()
        prompt = Prompt(engine, plain, seed=case)
        prompt.place(without=stretches)
        before = engine.snapshot()
        repair.forward(stretches, prompt.blocks, prompt.ids.tolist())
        off = prompt.off(*prompt.wanted(stretches))
        assert off <= NEAR, (stretches, off)
        assert changed(engine, before) == {
            prompt.slots[i] for first, end in stretches for i in range(first, end)
        }


def changed(engine: Engine, before: list[torch.Tensor]) -> set[int]:
    """Slots of which a bit differs in any layer."""
    group, found = engine.groups()[0], set()
    for old, new in zip(before, group.caches, strict=True):
        for part in (0, 1):
            for block in (old != new).flatten(1).any(1).nonzero().flatten().tolist():
                for slot in range(block * group.block_tokens, (block + 1) * group.block_tokens):
                    one, other = (token(group.layout, x, part, slot) for x in (old, new))
                    if not torch.equal(one, other):
                        found.add(slot)
    return found


def slices_give_what_one_call_gives() -> None:
    engine, plain = tiny()
    repair = engine.repair()
    for limit, sequences in ((1000, 8), (40, 8), (16, 2), (7, 1)):
        stretches = choices(3)[2]
        prompt = Prompt(engine, plain, seed=9)
        prompt.place(without=stretches)
        slices = cut(stretches, limit, sequences)
        tokens = [i for part in slices for first, end in part for i in range(first, end)]
        assert tokens == [i for first, end in stretches for i in range(first, end)]
        assert max(map(len, slices)) <= sequences
        assert max(sum(end - first for first, end in part) for part in slices) <= limit
        for part in slices:
            repair.forward(part, prompt.blocks, prompt.ids.tolist())
        assert prompt.off(*prompt.wanted(stretches)) <= NEAR, limit
    assert len(slices) > 10
    prompt.place(without=stretches)
    for part in reversed(slices):  # a later token would see rows that are not there yet
        repair.forward(part, prompt.blocks, prompt.ids.tolist())
    assert prompt.off(*prompt.wanted(stretches)) > NEAR


def requests_beside_it_say_what_they_say_alone() -> None:
    """Repairs between the steps of requests that decode, and within them: before and behind the
    runner's own forward, in its forward context, where vLLM calls `start_load_kv`."""
    engine, plain = tiny()
    prompts = [[(7 * i + 3 * k) % 500 + 5 for k in range(200)] for i in range(2)]
    alone = [engine.say([p])[0] for p in prompts]
    repair, stretches = engine.repair(), choices(4)[2]
    prompt = Prompt(engine, plain, seed=5)
    prompt.lie_in(range(100, 110))
    wanted, repaired = prompt.wanted(stretches), []

    def between() -> None:
        prompt.place(without=stretches)
        repair.forward(stretches, prompt.blocks, prompt.ids.tolist())
        repaired.append(prompt.off(*wanted))

    assert engine.say(prompts, between) == alone
    usual = engine.runner._model_forward
    for before in (True, False):

        def around(*given: Any, before: bool = before, **how: Any) -> Any:
            if before:
                between()
            out = usual(*given, **how)
            if not before:
                between()
            return out

        engine.runner._model_forward = around
        try:
            assert engine.say(prompts) == alone
        finally:
            engine.runner._model_forward = usual
    assert len(repaired) > 20
    assert max(repaired) <= NEAR


def what_cannot_be_computed_is_refused_before_anything_is() -> None:
    engine, plain = tiny()
    repair = engine.repair()
    ids, blocks = [5] * 64, [3, 4]
    before = engine.snapshot()
    wrong: list[tuple[Any, Any, Any]] = [
        ([], blocks, ids),
        ([(4, 4)], blocks, ids),
        ([(5, 4)], blocks, ids),
        ([(-1, 4)], blocks, ids),
        ([(4, 9), (8, 10)], blocks, ids),
        ([(60, 65)], blocks, [5] * 65),
        ([(40, 50)], blocks, ids[:45]),
        ([(0, 4)], [0, 4], ids),
        ([(0, 4)], [-1, 4], ids),
        ([(40, 44)], [3, 1 << 20], ids),
        ([(0, 4)], blocks, [models.VOCAB] * 64),
        ([(0, 4)], blocks, [-1] * 64),
        ([(i, i + 1) for i in range(0, 18, 2)], blocks, ids),
        ([(0, 600)], list(range(1, 20)), [5] * 600),
    ]
    made = repair.batch([(0, 9), (20, 21), (40, 44)], blocks, ids)
    assert made.lengths == [1, 4, 9]  # some backends want what looks like decoding in front
    assert (made.ids.dtype, made.positions.is_contiguous()) == (torch.int32, True)
    for case in wrong:
        try:
            repair.forward(*case)
        except InputError:
            continue
        raise AssertionError(f"computed: {case}")
    assert changed(engine, before) == set()


def over(real: Any, **other: Any) -> Any:
    """`real`, some of whose attributes are others."""
    return type("Over", (), {"__getattr__": lambda _, name: getattr(real, name), **other})()


def each_way_of_running_that_cannot_be_repaired_is_refused() -> None:
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    engine, _ = tiny()
    real, groups = engine.config, engine.groups()
    none = dict.fromkeys(AttentionLayerBase.__abstractmethods__)
    layer = type("Latent", (AttentionLayerBase,), none)()
    parallel, model = real.parallel_config, real.model_config
    layers = over(real.compilation_config, static_forward_context={"x": layer, **engine.layers})
    for why, config in {
        "pipeline_parallel_size is 2": {
            "parallel_config": over(parallel, pipeline_parallel_size=2)
        },
        "decode_context_parallel_size is 2": {
            "parallel_config": over(parallel, decode_context_parallel_size=2)
        },
        "experts are shared": {
            "parallel_config": over(parallel, data_parallel_size=2, is_moe_model=True)
        },
        "dual batch": {"parallel_config": over(parallel, use_ubatching=True)},
        "adapters": {"lora_config": object()},
        "M-RoPE": {"model_config": over(model, uses_mrope=True)},
        "embeddings": {"model_config": over(model, enable_prompt_embeds=True)},
        "is fp8": {"cache_config": over(real.cache_config, cache_dtype="fp8")},
        "x is Latent": {"compilation_config": layers},
    }.items():
        assert why in refused(over(real, **config), groups), why
    for why, group in {
        "frees the blocks": groups[0]._replace(window=True),
        "is not known": groups[0]._replace(opaque=True),
        "has no KV of its own": groups[0]._replace(names=groups[0].names[1:]),
    }.items():
        assert why in refused(real, [group]), why
    dense = over(parallel, data_parallel_size=2, is_moe_model=False)
    found = find_model(over(real, parallel_config=dense), engine.kv, groups)
    assert found.module is engine.runner.model


def refused(config: Any, groups: list[Any]) -> str:
    try:
        find_model(config, tiny()[0].kv, groups)
    except LayoutError as why:
        return str(why)
    return "accepted"


def the_probe_scores_what_a_plain_forward_scores() -> None:
    """Over loaded rows, of a short tail and of one that is longer than the queries asked."""
    engine, plain = tiny()
    repair = engine.repair()
    for tail in ((N - 20, N), (N - 100, N)):
        prompt = Prompt(engine, plain, seed=6)
        prompt.place(without=[tail])
        found = probe(repair, tail, prompt.blocks, prompt.ids.tolist())
        k, v = [x.clone() for x in prompt.k], [x.clone() for x in prompt.v]
        chosen = torch.arange(*tail)
        queries = plain.repair(prompt.ids, k, v, chosen)
        shares = []
        for q, keys in zip(queries, k, strict=True):
            seen = plain.attention(q[-64:], keys, chosen[-64:])[..., : tail[0]].sum(1)
            shares.append((seen / seen.sum(-1, keepdim=True)).amax(0))
        wanted = torch.stack(shares).mean(0)
        assert found.dtype.name == "float32"
        assert torch.allclose(torch.from_numpy(found), wanted, rtol=1e-3, atol=1e-6)
        assert prompt.off(k, v) <= NEAR
    assert not hooks(engine)


def no_hook_is_left_behind() -> None:
    engine, _ = tiny()

    class Breaks(Repair):
        def compute(self, *given: Any, **how: Any) -> None:
            assert len(hooks(engine)) == 4
            super().compute(*given, **how)
            raise RuntimeError("broken")

    for repair, error in ((engine.repair(Breaks), RuntimeError), (engine.repair(), InputError)):
        try:
            probe(repair, (8, 20) if error is RuntimeError else (20, 8), [3], [5] * 20)
        except error:
            assert not hooks(engine)
            continue
        raise AssertionError("nothing was raised")


def hooks(engine: Engine) -> list[Any]:
    return [
        h for layer in engine.groups()[0].names for h in engine.layers[layer]._forward_pre_hooks
    ]


CASES = [
    rows_equal_a_selective_forward_and_all_others_stay,
    slices_give_what_one_call_gives,
    requests_beside_it_say_what_they_say_alone,
    what_cannot_be_computed_is_refused_before_anything_is,
    each_way_of_running_that_cannot_be_repaired_is_refused,
    the_probe_scores_what_a_plain_forward_scores,
    no_hook_is_left_behind,
]

if __name__ == "__main__":
    for case in globals()[sys.argv[2]]:
        case()
        print(case.__name__, flush=True)
    tiny()[0].__exit__()
