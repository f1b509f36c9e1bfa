"""The scheduler's side alone, by vLLM's own types: orders of events an engine hardly ever makes."""

from __future__ import annotations

import re
from pathlib import Path

import launch

CASES = Path(__file__).with_name("scheduler_cases.py")


def test_orders_of_events_that_an_engine_hardly_ever_makes() -> None:
    run = launch.finish(CASES, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    written = re.findall(r"^def (\w+)\(\) -> None:", CASES.read_text(), re.MULTILINE)
    assert run.stdout.split() == written
