"""Codecs under numba's bounds checks, which a process must be started with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_BOUNDED = """
import importlib, sys
sys.path[:0] = sys.argv[1:3]
for name in sys.argv[3:]:
    file, contract = name.split(":")
    getattr(importlib.import_module(file), contract)().fuzz(2000)
print("done")
"""


def fuzz_with_bounds_checks(cache: Path, *contracts: str) -> None:
    """Mutated frames for every `file:Class` in tests/stages/codecs, by kernels compiled with bounds
    checks, which are kept in the folder `cache`: nothing is touched outside of buffers."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", _BOUNDED, str(here / "stages" / "codecs"), str(here), *contracts],
        env={**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.stdout == "done\n", done.stderr
