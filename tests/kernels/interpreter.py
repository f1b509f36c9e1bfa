"""Running a file's tests under Triton's interpreter.

TRITON_INTERPRET must be set before a kernel is defined, and the ahead-of-time gate needs it unset:
hence a child process. It runs what the `device` fixture of `conftest.py` has marked.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

PATIENCE = 280
"""Seconds: some 25 of CPU time a file, on a machine that others may use as well."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(file: str, *, least: int) -> None:
    """All of `file`'s tests with an interpreted `device` pass; there are `least` or more."""
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-k", "interpreter and not under",
            "-p", "no:cacheprovider", file,
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= least, done.stdout
    assert "skipped" not in done.stdout, done.stdout
