"""What is tested with SGLang's own classes (`contract/`) runs where they can be imported."""

from __future__ import annotations

import subprocess

import pytest
from real_engine import PYTHON, ROOT, environment

CONTRACT = "tests/adapters/sglang/contract"


@pytest.mark.timeout(900)
def test_contract() -> None:
    command = [str(PYTHON), "-m", "pytest", CONTRACT, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        ["nice", *command], cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False, timeout=880,
    )  # fmt: skip
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode or "passed" not in last or "skipped" in last:
        pytest.fail(f"{done.stdout[-20_000:]}\n{done.stderr[-4000:]}", pytrace=False)
