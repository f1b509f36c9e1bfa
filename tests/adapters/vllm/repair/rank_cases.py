"""The same on several tensor-parallel ranks, and a real model: run by vLLM's own Python.

    python rank_cases.py FOLDER LIST

Prints the names of the cases of a list that held.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]
import models  # noqa: E402
from engines import OPTIONS  # noqa: E402
from plain import Plain  # noqa: E402
from vllm import LLM  # noqa: E402

FOLDER = Path(sys.argv[1])
STRETCHES = [(0, 5), (40, 41), (70, 110), (150, 151), (199, 200)]
TAIL = (240, 260)


def on_rank(worker: Any, ids: Any, k: Any, v: Any, stretches: Any, tail: Any) -> Any:
    """Runs in each worker's process: proofs, a repair and a probe; its heads' rows, the scores."""
    import gc

    import numpy as np
    from vllm.distributed.parallel_state import get_tp_group

    from tierloom.adapters.vllm.repair.engine_model import find_model
    from tierloom.adapters.vllm.repair.forward import Repair, cut
    from tierloom.adapters.vllm.repair.probe import probe
    from tierloom.adapters.vllm.repair.proofs import prove, read_rotation
    from tierloom.adapters.vllm.repair.rows import Rows
    from tierloom.adapters.vllm.worker.layout import cache_groups
    from tierloom.stages.kv.layout_check import token

    gc.unfreeze()
    runner = worker.model_runner
    known = runner.vllm_config.compilation_config.static_forward_context
    groups = cache_groups({n: a.kv_cache for n, a in known.items()}, runner.kv_cache_config, known)
    group = groups[0]
    model = find_model(runner.vllm_config, runner.kv_cache_config, groups)
    repair = Repair(model, runner.vllm_config, runner.kv_cache_config, group)
    blocks = [9, 4, 12, 2, 7, 30, 21, 16, 3]
    why = prove(repair, blocks, read_rotation(model.rotary))
    slots = repair.slots(blocks)[: len(ids)]
    rank, heads = get_tp_group().rank_in_group, group.layout.heads
    mine = slice(rank * heads, (rank + 1) * heads)
    chosen = {i for first, end in [*stretches, tail] for i in range(first, end)}
    for i, cache in enumerate(group.caches):
        for at, slot in enumerate(slots.tolist()):
            for part, rows in ((0, k[i]), (1, v[i])):
                value = np.full((heads, group.layout.dim), 555.0) if at in chosen else np.array(
                    rows[at][mine])  # fmt: skip
                token(group.layout, cache, part, slot).copy_(
                    torch.from_numpy(np.array(value, np.float32)))  # fmt: skip
    for part in cut(stretches, repair.tokens, repair.sequences):
        repair.forward(part, blocks, ids)
    scores = probe(repair, tail, blocks, ids)
    with Rows(group, len(ids), len(group.caches)) as rows:
        found = rows.read(slots, range(len(group.caches))).numpy()
    return why, scores, found


def check(folder: Path, vocabulary: int, ranks: int, **options: Any) -> None:
    plain = Plain(folder)
    n = TAIL[1]
    ids = torch.randint(3, vocabulary, (n,), generator=torch.Generator().manual_seed(1))
    k, v = plain.prefill(torch.cat([ids[n // 2 :], ids[: n // 2]]))
    llm = LLM(str(folder), **{**OPTIONS, "tensor_parallel_size": ranks, **options})
    given = [[x.numpy() for x in rows] for rows in (k, v)]
    told = llm.collective_rpc(on_rank, args=(ids.tolist(), *given, STRETCHES, TAIL))
    plain.repair(ids, k, v, torch.cat([torch.arange(*s) for s in STRETCHES]))
    chosen = torch.arange(*TAIL)
    shares = []
    for q, keys in zip(plain.repair(ids, k, v, chosen), k, strict=True):
        seen = plain.attention(q, keys, chosen)[..., : TAIL[0]].sum(1)
        shares.append((seen / seen.sum(-1, keepdim=True)).amax(0))
    wanted = torch.stack(shares).mean(0)
    assert [why for why, *_ in told] == [None] * ranks
    found = torch.cat([torch.from_numpy(rows) for *_, rows in told], 3)
    off = (found - torch.stack([torch.stack(k), torch.stack(v)])).abs().max()
    print(f"{ranks} ranks: rows off by {off:.2g}", file=sys.stderr)
    assert off <= 1e-3
    for _, scores, _ in told:
        assert (scores == told[0][1]).all()
        assert torch.allclose(torch.from_numpy(scores), wanted, rtol=1e-2, atol=1e-5)
    llm.llm_engine.engine_core.shutdown()


def two_ranks_compute_what_one_would() -> None:
    check(models.llama(FOLDER / "llama"), models.VOCAB, 2)


def a_real_model_is_computed_as_in_plain_torch() -> None:
    from tierloom.adapters.demo import smollm2

    check(smollm2.model_dir(progress=False), 49152, 1, kv_cache_memory_bytes=96 << 20)


def a_compiled_model_is_computed_as_in_plain_torch() -> None:
    check(models.llama(FOLDER / "llama"), models.VOCAB, 1, enforce_eager=False)


CAMPAIGN = [two_ranks_compute_what_one_would, a_real_model_is_computed_as_in_plain_torch]
COMPILED = [a_compiled_model_is_computed_as_in_plain_torch]

if __name__ == "__main__":
    for case in globals()[sys.argv[2]]:
        case()
        print(case.__name__, flush=True)
