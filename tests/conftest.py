"""Keep the checkout's root off sys.path.

There, `adapters` and `triton_kernels` would pass for other people's packages.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != ROOT]

# What tests share is imported once by name. This folder does not stay on the path: its own folders
# (`transformers`!) would pass for other people's packages, too.
pytest.register_assert_rewrite("contracts")
sys.path.append(str(ROOT / "tests"))
import contracts  # noqa: E402, F401
import tiny  # noqa: E402, F401

sys.path.pop()
