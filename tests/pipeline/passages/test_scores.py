"""What a prompt's last tokens attend to, read by the pipeline itself where K lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from conftest import Engine, tokens

from tierloom import InputError
from tierloom.stages.blend.policies import Amount, Patchwork
from tierloom.stages.kv.text import Excerpt, Run
from tierloom.triton_kernels.blend.reference import paid_to

from .blends import blending, opened_with, rows

if TYPE_CHECKING:
    from conftest import Open

    from tierloom.stages.contract.ticket import Ticket

BEFORE, PASSAGE, QUESTION = 70, 128, 9
PROMPT = np.concatenate([tokens(BEFORE, 3), tokens(PASSAGE, 1), tokens(QUESTION, 4)])
END = BEFORE + PASSAGE


def blended(opened: Open, **mend: object) -> tuple[Ticket, Engine, np.ndarray, list[torch.Tensor]]:
    """A retrieve that has ended, whose engine has computed the question over it, and the question's
    queries in each layer. Nothing but NaN is where the prompt begins."""
    engine = Engine(dtype=torch.float32, heads=2)
    source = blending(policy="probe", share="10 %", **mend)
    pipe, target = opened_with(opened, source, engine), engine.blank()
    kept = np.concatenate([tokens(64, 2), PROMPT[BEFORE:END]])
    pipe.store(kept, engine.caches, engine.slots(192)).wait()
    to = target.slots(len(PROMPT))
    ticket = pipe.retrieve(PROMPT, target.caches, to, blend=True)
    assert ticket.wait().blended == PASSAGE
    make = torch.Generator().manual_seed(0)
    for cache in target.caches:
        flat = cache.flatten(1, 2)
        flat[:, to[:BEFORE]] = torch.nan
        flat[:, to[END:]] = torch.randn(flat[:, to[END:]].shape, generator=make)
    queries = [3 * torch.randn(QUESTION, 4, engine.dim, generator=make) for _ in target.caches]
    return ticket, target, to, queries


def test_what_the_question_attends_to_is_computed(opened: Open) -> None:
    ticket, target, to, queries = blended(opened)
    assert ticket.needs == "scores"
    for layer, q in enumerate(queries):
        ticket.scores(layer, q)
    keys, here = rows(target, to)[0], torch.arange(len(to)) >= BEFORE
    at = torch.arange(END, len(to))
    want = torch.stack([
        paid_to(q.double(), k.nan_to_num(), at, here, END, target.dim**-0.5)
        for q, k in zip(queries, keys, strict=True)
    ]).mean(0)  # fmt: skip
    work = Patchwork(len(to), 0, [Run((Excerpt(BEFORE, PASSAGE, b"", 0, 0),), seam=True)])
    weighed = want.numpy() * work.strangeness(Amount(0, 0).near)[:END]
    best = np.sort(np.argsort(-weighed)[: PASSAGE // 10])
    mask = np.zeros(len(to), np.bool_)
    for first, end in ticket.compute():
        mask[first:end] = True
    assert mask[:BEFORE].all()
    assert mask[END:].all()
    assert np.array_equal(np.flatnonzero(mask[:END])[BEFORE:], best)
    assert ticket.attended == pytest.approx(float(want[best].sum() / want.sum()), rel=1e-4)


@pytest.mark.parametrize(("heads", "computed"), [(None, 16), (0, 0), (5, 5)])
def test_without_scores_heads_are_computed(opened: Open, heads: int | None, computed: int) -> None:
    ticket, _, to, _ = blended(opened, **({} if heads is None else {"heads": heads}))
    assert ticket.compute() == [(0, BEFORE + computed), (END, len(to))]


def test_scores_of_the_caller_come_first(opened: Open) -> None:
    ticket, _, to, queries = blended(opened)
    ticket.scores(0, queries[0])
    mine = np.zeros(len(to))
    mine[BEFORE : BEFORE + 12] = 1
    assert ticket.compute(mine) == [(0, BEFORE + 12), (END, len(to))]


def test_queries_that_do_not_fit_are_refused(opened: Open) -> None:
    ticket, target, _, queries = blended(opened)
    q = queries[0]
    for layer, wrong in (
        (0, q[:, :3]), (0, q[..., :-1]), (0, q[0]), (len(queries), q), (-1, q), (0, q[:0]),
        (0, torch.zeros(QUESTION + 1, 4, target.dim)),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"scores of layer"):
            ticket.scores(layer, wrong)


def test_how_long_computing_took_moves_the_share(opened: Open) -> None:
    """Only where it was asked to."""
    engine = Engine(dtype=torch.float32)
    for adapt, chosen in ((False, 14), (True, 9)):
        pipe = opened_with(
            opened, blending(policy="probe", heads=0, share="11 %", adapt=adapt), engine
        )
        pipe.store(PROMPT[BEFORE:END], engine.caches, engine.slots(PASSAGE)).wait()
        for _ in range(3):
            target = engine.blank()
            ticket = pipe.retrieve(PROMPT, target.caches, target.slots(len(PROMPT)), blend=True)
            ticket.wait()
            ticket.repaired(1e9)
        computed = sum(b - a for a, b in ticket.compute(np.ones(len(PROMPT))))
        assert computed - BEFORE - QUESTION == chosen
