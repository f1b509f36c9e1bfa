"""What blended prompts leave behind for those that asked for nothing: run by vLLM's own Python.

    python exact_cases.py FOLDER LIST

Prints the names of the cases of a list that held.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent))
from blending import ASK, NEAR, SYSTEM, Blending, blending, plain, run
from harness import BLOCK, prompt

from tierloom.adapters.vllm.repair.rows import Rows
from tierloom.stages.kv.block_table import BlockTable
from tierloom.stages.kv.prefix import Chain

CHUNK = 256

PASSAGES = [prompt(96 + 8 * (i % 5), 50 + i) for i in range(12)]
"""Not all of whole blocks: a passage begins and ends where it likes."""


def orders(prompts: int) -> list[list[int]]:
    """Prompts of four passages each, in an order that was not there before, and a question."""
    chance, seen, out = random.Random(5), set(), []
    while len(out) < prompts:
        picked = tuple(chance.sample(range(len(PASSAGES)), 4))
        if picked not in seen:
            seen.add(picked)
            length = chance.choice((chance.randrange(8, 60), chance.randrange(90, 200)))
            question = prompt(length, 1000 + len(out))  # a long one is kept, by its content
            out.append([*SYSTEM, *(t for i in picked for t in PASSAGES[i]), *question])
    return out


def in_prefix_cache(engine: Blending, ids: list[int], exact: torch.Tensor) -> tuple[int, int]:
    """Blocks that vLLM's prefix cache has for a plain prompt, and those of them that are not what a
    cold engine computes."""
    from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

    named = SimpleNamespace(
        block_hashes=[], num_tokens=len(ids), all_token_ids=ids, mm_features=[], lora_request=None,
        cache_salt=None, prompt_embeds=None,
    )  # fmt: skip
    pool = engine.core.scheduler.kv_cache_manager.block_pool
    found = wrong = 0
    for i, name in enumerate(engine.core.request_block_hasher(named)):
        blocks = pool.cached_block_hash_to_block._cache.get(make_block_hash_with_group_id(name, 0))
        for block in blocks.values() if isinstance(blocks, dict) else filter(None, [blocks]):
            rows = engine.rows([block.block_id], BLOCK)
            found += 1
            wrong += bool((rows - exact[:, :, BLOCK * i : BLOCK * i + BLOCK]).abs().max() > NEAR)
    return found, wrong


def in_store(engine: Blending, chain: Chain, exact: torch.Tensor) -> tuple[int, int]:
    """Tokens that are kept of a plain prompt under its chain keys, whether or not its head is kept
    as well, and grains of them that are not what a cold engine computes."""
    group, layers = engine.pipeline.group, exact.shape[1]
    own = group._replace(caches=[torch.zeros_like(c) for c in group.caches])
    blocks = list(range(1, 1 + CHUNK // BLOCK))
    slots = engine.blends._made().slots(blocks)
    found = wrong = 0
    for first in range(0, len(chain.links), CHUNK // BLOCK):
        span = chain.span(first, min(first + CHUNK // BLOCK, len(chain.links)))
        table = engine.pipeline.blocks(BlockTable(blocks[: span.tokens // BLOCK]))
        got = engine.pipeline.pipeline.retrieve(span, own.caches, blocks=table).wait().tokens
        if got:
            with Rows(own, got, layers) as rows:
                there = rows.read(slots[:got], range(layers))
            off = (there - exact[:, :, first * BLOCK : first * BLOCK + got]).abs()
            found += got
            wrong += sum(bool((part > NEAR).any()) for part in off.split(BLOCK, 2))
    return found, wrong


def ask(engine: Blending, prompts: list[list[int]]) -> dict[str, int]:
    """Blend all of `prompts`, three at a time and plain ones between them; what is then wrong."""
    cold = [engine.cold(ids) for ids in prompts]
    engine.keep(*([*SYSTEM, *(t for p in PASSAGES[i : i + 4] for t in p)] for i in (0, 4, 8)))
    engine.core.scheduler.reset_prefix_cache()
    count = dict.fromkeys(("blended", "tokens", "blocks", "wrong blocks", "kept", "wrong kept"), 0)
    count["wrong answers"] = 0

    def asked(at: int, kv: dict[str, Any] | None) -> str:
        return engine.driver.add(prompts[at], kv=kv)

    for first in range(0, len(prompts), 3):
        names = [asked(at, ASK) for at in range(first, min(first + 3, len(prompts)))]
        plainly = asked(first - 3, None) if first else ""
        count["blended"] += sum(f["cached"] > len(SYSTEM) for f in engine.driver.finish(names))
        if plainly:
            count["wrong answers"] += engine.driver.finish([plainly])[0]["ids"] != cold[first - 3]
    engine.driver.settle()
    for at, ids in enumerate(prompts):
        exact = torch.stack([torch.stack(rows) for rows in plain().prefill(torch.tensor(ids))])
        seen = {"blocks": in_prefix_cache(engine, ids, exact)}
        name = asked(at, {"tierloom.skip_save": True})
        tracked = next(p for n, p in engine.side._requests.items() if n.startswith(name))
        seen["kept"] = in_store(engine, tracked.chain, exact)
        for what, (found, wrong) in seen.items():
            count[what] += found
            count["wrong " + what] += wrong
        found = engine.driver.finish([name])[0]
        count["wrong answers"] += found["ids"] != cold[at]
        count["tokens"] += found["cached"]
    print(len(prompts), "prompts:", count, file=sys.stderr)
    return count


def check(prompts: int) -> None:
    with blending("heads") as engine:
        count = ask(engine, orders(prompts))
        assert count["blended"] == prompts
        assert count["blocks"] >= 2
        assert count["kept"] >= prompts * len(SYSTEM)
        assert [n for what, n in count.items() if what.startswith("wrong")] == [0, 0, 0]


def what_others_get_after_blends_is_exact() -> None:
    check(12)


def what_others_get_after_200_blends_is_exact() -> None:
    check(200)


def without_salt_others_get_approximate_blocks() -> None:
    """The same, with nothing but the salt left out."""
    with blending("heads", alone=True) as engine:
        engine.side.blends.salt = lambda *_: None
        count = ask(engine, orders(12))
        assert all(n for what, n in count.items() if what.startswith("wrong")), count


CASES = [what_others_get_after_blends_is_exact, without_salt_others_get_approximate_blocks]
CAMPAIGN = [what_others_get_after_200_blends_is_exact]

if __name__ == "__main__":
    run(globals()[sys.argv[2]])
