"""How vLLM's tensors are read: what can be seen of it without an engine."""

from __future__ import annotations

import re
from pathlib import Path

import launch

CASES = Path(__file__).with_name("layout_cases.py")


def test_vllms_memory_is_not_written_to_learn_its_layout() -> None:
    run = launch.finish(CASES, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    written = re.findall(r"^def (\w+)\(\) -> None:", CASES.read_text(), re.MULTILINE)
    assert run.stdout.split() == written
