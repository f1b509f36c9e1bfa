"""disk and files end at each write of theirs: never a wrong byte, nothing acknowledged is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.campaign
@pytest.mark.parametrize("kind", ["disk", "files"])
def test_killed_at_each_write(tmp_path: Path, kind: str) -> None:
    script = Path(__file__).with_name("crash_points.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), kind, str(tmp_path / "kv")], capture_output=True,
        text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= {"disk": 40, "files": 40}[kind]
