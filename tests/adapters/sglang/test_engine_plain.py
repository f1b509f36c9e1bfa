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


def by_transformers(model: Path, tokens: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy ids and their log-probs."""
    from transformers import AutoModelForCausalLM

    llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids: list[int] = []
    logprobs: list[float] = []
    with torch.no_grad():
        for _ in range(count):
            out = llama(torch.tensor([tokens + ids]), use_cache=False)
            chances = torch.log_softmax(out.logits[0, -1].float(), -1)
            ids.append(int(chances.argmax()))
            logprobs.append(float(chances[ids[-1]]))
    return ids, logprobs


@pytest.fixture
def plain(engine: Engine, llama: Path) -> Iterator[Engine]:
    return engine.use(llama)


def test_ids_and_logprobs_are_those_of_transformers(plain: Engine, llama: Path) -> None:
    tokens = prompt(600)
    ids, logprobs = by_transformers(llama, tokens, 16)
    cold = plain.one(tokens, max_tokens=16)
    assert (cold.ids, cold.cached) == (ids, 0)
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
