"""Two ranks that lose different pages agree on the shorter prefix, and neither waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(folder: Path, model: Path, rounds: int, seed: int, seconds: int) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ranks.py")), str(rank), str(folder),
             str(model), str(rounds), str(seed)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=seconds)[0].decode(errors="replace") for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for rank, text in zip(ranks, said, strict=True):
        assert rank.returncode == 0, text[-3000:]


@pytest.mark.timeout(240)
def test_they_agree(tmp_path: Path, model: Path) -> None:
    run(tmp_path, model, 15, 1, 200)


@pytest.mark.campaign
@pytest.mark.timeout(1500)
def test_they_agree_for_long(tmp_path: Path, model: Path) -> None:
    run(tmp_path, model, 500, 2, 1400)
