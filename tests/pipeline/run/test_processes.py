"""Processes that fork, are interrupted, and end while a pipeline is open."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from conftest import Engine, tokens, with_disk

if TYPE_CHECKING:
    from conftest import Open


def test_forked_interrupted_and_ended(opened: Open, tmp_path: Path) -> None:
    script = Path(__file__).with_name("lives.py")
    paths = [str(script.parents[1]), *os.environ.get("PYTHONPATH", "").split(":")]
    # Forking beside threads, of which Python warns, is what is tried.
    command = [sys.executable, "-P", "-W", "ignore", str(script), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=100,
        env=os.environ | {"PYTHONPATH": ":".join(filter(None, paths))},
    )  # fmt: skip
    assert done.stdout.split() == ["forks", "interrupts", "ends"], done.stderr
    assert done.returncode == 0
    assert done.stderr == "", "nothing is said at the end of an interpreter"
    engine = Engine()
    pipe = opened(with_disk(tmp_path / "ends"), engine, model="m")
    assert pipe.lookup(tokens(192)) == 192
    target, slots = engine.blank(), engine.slots(192)
    assert pipe.retrieve(tokens(192), target.caches, slots).wait(20).tokens == 192
