"""A pipeline in words: what `tierloom explain` prints."""

from __future__ import annotations

import re

import pytest

from tierloom.pipeline.config.explain import explain, mermaid
from tierloom.pipeline.config.load import load_config


@pytest.fixture
def spec(monkeypatch):
    for name in ("TIERLOOM_MEMORY", "TIERLOOM_DIR", "TIERLOOM_DISK"):
        monkeypatch.delenv(name, raising=False)
    return load_config("tiered", {"tiers.warm.timeout": "150 ms"})


def test_words_say_units_lanes_segments_and_wires(spec) -> None:
    lines = [re.sub(" +", " ", line.strip()) for line in explain(spec).splitlines()]
    for line in (
        "budget: arena 512 MiB, inflight 512, threads 4, touch yes",
        "hot: memory capacity 2 GiB, evict s3-fifo",
        "breaker: timeout 150 ms",
        "graph retrieve: pace (by request, window 2, idle 60 s), deadline 800 ms, on_error partial",
        "├─ hot: put, tier hot 3 loop receipt@host/request 64 deep, 8 at once, block when full",
        "└─ warm: put, tier warm 4 loop receipt@host/request 64 deep, 8 at once, drop when full",
        "place: scatter 2 pool receipt@host/request",
    ):
        assert line in lines


def test_the_picture_shows_both_graphs_and_the_tiers(spec) -> None:
    picture = mermaid(spec).splitlines()
    assert picture[0] == "flowchart LR"
    for line in (
        '    store_pack -->|"kv@device"| store_host',
        "  store_warm ==> tier_warm",
        "  tier_warm -.-> retrieve_plan",
        "  retrieve_fetch ==> tier_hot",
        '  tier_hot[("hot<br/>memory")]',
    ):
        assert line in picture
    assert sum(line.startswith("  subgraph") for line in picture) == 2
