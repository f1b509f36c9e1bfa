"""Any order of SGLang's calls, over a store that damages, delays, forgets and fails."""

from __future__ import annotations

import os
from typing import Any

import hypothesis.strategies as st
import pytest
from awkward import KEPT, Mood, over
from backend import BASE, PAGE, Prompt, backend
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

AWKWARD = {k: v for k, v in BASE.items() if not k.startswith("tiers.")}
PAGES = 11


class Calls(RuleBasedStateMachine):
    """Three prompts of which two begin alike; `Prompt.loaded` compares each page that came."""

    pools: Any

    @initialize()
    def begin(self) -> None:
        Mood.well()
        KEPT.clear()
        self.host, _ = self.pools("mha", "page_first", slots=256)
        self.storage = self.open()
        same = [n * 13 % 1000 for n in range(6 * PAGE)]
        tails = [[n * 7 + i for n in range((PAGES - 6) * PAGE)] for i in range(2)]
        whole = [n * 3 + 5 for n in range(PAGES * PAGE)]
        self.texts = [Prompt(self.host, same + tails[0]), Prompt(self.host, same + tails[1]),
                      Prompt(self.host, whole)]  # fmt: skip
        for i in range(6):  # one KV for one text
            self.host.set_from_flat_data_page(self.texts[1].at(i), self.texts[0].content[i].clone())
            self.texts[1].content[i] = self.texts[0].content[i]

    def open(self) -> Any:
        return backend(self.host, AWKWARD | over() | {"graphs.retrieve.deadline": "80 ms"})

    @rule(text=st.integers(0, 2), first=st.integers(0, PAGES - 1), many=st.integers(1, PAGES))
    def save(self, text: int, first: int, many: int) -> None:
        self.texts[text].save(self.storage, first, min(PAGES, first + many))

    @rule(text=st.integers(0, 2), first=st.integers(0, PAGES - 1), many=st.integers(1, PAGES))
    def load(self, text: int, first: int, many: int) -> None:
        self.texts[text].loaded(self.storage, first, min(PAGES, first + many))

    @rule(text=st.integers(0, 2), first=st.integers(0, PAGES - 1))
    def count(self, text: int, first: int) -> None:
        assert 0 <= self.texts[text].count(self.storage, first) <= PAGES - first

    @rule(
        how=st.sampled_from(["damage", "late", "stuck", "down", "lost"]),
        much=st.sampled_from([0.0, 0.3, 1.0]),
    )
    def change(self, how: str, much: float) -> None:
        Mood.delay = 0.03
        setattr(Mood, how, much)

    @rule()
    def forget_memory(self) -> None:
        pipeline = self.storage._store.pipeline
        pipeline._portal.call(pipeline.tiers["hot"].clear)

    @rule()
    def clear(self) -> None:
        self.storage.clear()

    @rule()
    def restart(self) -> None:
        self.storage.close()
        self.storage = self.open()

    def teardown(self) -> None:
        if hasattr(self, "storage"):
            arena = self.storage._store.pipeline.arena
            self.storage.close()
            assert arena.leases == 0
        Mood.well()


@pytest.mark.timeout(1200)
def test_any_order(host_pool: Any) -> None:
    Calls.pools = staticmethod(host_pool)
    many = int(os.environ.get("TIERLOOM_CASES", "25"))
    machine = Calls.TestCase
    machine.settings = settings(
        max_examples=many, stateful_step_count=25, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    machine().runTest()
