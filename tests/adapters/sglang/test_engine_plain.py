"""The real engine without a cache of ours says what transformers says: the others' yardstick."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from real_engine import Engine, prompt

if TYPE_CHECKING:
    from collections.abc import Iterator


def by_transformers(
    model: Path, tokens: list[int], ids: list[int]
) -> tuple[list[int], list[float]]:
    """The likeliest id at each of the places of `ids`, which follow `tokens`, and its log-prob."""
    from transformers import AutoModelForCausalLM

    llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = llama(torch.tensor([tokens + ids[:-1]])).logits[0, len(tokens) - 1 :]
    logprobs, likeliest = torch.log_softmax(logits.float(), -1).max(-1)
    return likeliest.tolist(), logprobs.tolist()


@pytest.fixture
def plain(engine: Engine, llama: Path) -> Iterator[Engine]:
    return engine.use(llama)


def test_ids_and_logprobs_are_those_of_transformers(plain: Engine, llama: Path) -> None:
    tokens = prompt(600)
    cold = plain.one(tokens, max_tokens=16)
    ids, logprobs = by_transformers(llama, tokens, cold.ids)
    assert (cold.ids, cold.cached, len(ids)) == (ids, 0, 16)
    assert cold.logprobs == pytest.approx(logprobs, abs=1e-3)
    again = plain.one(tokens, max_tokens=16)
    assert (again.ids, again.cached) == (ids, 576)
    plain.flush()
    after, other = plain.generate(tokens, prompt(600, seed=2), max_tokens=16)
    assert (after.ids, after.cached) == (ids, 0)
    assert other.ids != ids


def test_salts_do_not_share(plain: Engine) -> None:
    tokens = prompt(300, seed=3)
    plain.one(tokens, cache_salt="one")
    assert plain.one(tokens, cache_salt="one").cached == 288
    assert plain.one(tokens, cache_salt="two").cached == 0
    assert plain.one(tokens, extra_key="one").cached == 0


def running(group: int) -> list[str]:
    """Names of the processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text().rpartition(") ")
            state, _, its_group = rest.split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(name)
    return found


def test_nothing_is_left_of_it_when_it_is_killed(plain: Engine) -> None:
    group = plain.pid
    assert len(running(group)) >= 3  # with SGLang's scheduler and detokenizer
    plain.kill()
    end = time.monotonic() + 10
    while left := running(group):
        assert time.monotonic() < end, left
        time.sleep(0.05)
