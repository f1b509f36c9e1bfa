"""How vLLM's tensors are read: what can be seen of it without an engine."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import harness

CASES = Path(__file__).with_name("layout_cases.py")


def test_vllms_memory_is_not_written_to_learn_its_layout() -> None:
    run = subprocess.run(
        [harness.PYTHON, CASES],
        capture_output=True, text=True, timeout=300, env=harness.environment(),
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    written = re.findall(r"^def (\w+)\(\) -> None:", CASES.read_text(), re.MULTILINE)
    assert run.stdout.split() == written
