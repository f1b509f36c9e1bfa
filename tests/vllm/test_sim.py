"""vLLM's own scheduler and both sides of the connector around a model that is a formula.

A slice of what `make test-vllm` runs whole: every order of hooks, and engines of any sizes.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import harness
import pytest

RUN = Path(__file__).with_name("sim_run.py")
WHOLE = bool(os.environ.get("TIERLOOM_WHOLE"))


def played(model: Path, *arguments: Any) -> dict[str, Any]:
    run = subprocess.run(
        ["nice", harness.PYTHON, RUN, model, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=10_000 if WHOLE else 580,
        env=harness.environment(VLLM_LOGGING_LEVEL="ERROR"),
    )
    said = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert len(said) == 1
    result: dict[str, Any] = json.loads(said[0].removeprefix("RESULT "))
    print(result)
    return result


@pytest.mark.timeout(10_000 if WHOLE else 600)
def test_no_order_of_hooks_reads_a_block_that_is_somebody_elses(llama: Path) -> None:
    """Saves by layer and by step, finished, given up, preempted and continued requests, drafts
    that are refused; blocks are overwritten as soon as nobody holds them."""
    result = played(llama, "orders", 3, 1) if WHOLE else played(llama, "orders", 1, 11)
    assert (result["wrong"], result["read_late"]) == ([], 0)
    assert result["hit_tokens"] > 10 * result["engines"]


@pytest.mark.timeout(10_000 if WHOLE else 600)
def test_any_block_size_with_any_chunk_size(llama: Path) -> None:
    result = played(llama, "positions", 1250 if WHOLE else 16, 7)
    assert (result["wrong"], result["read_late"]) == ([], 0)
    assert result["hit_tokens"] > 100 * result["engines"]
