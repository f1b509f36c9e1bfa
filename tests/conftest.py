"""Keep the checkout's root off sys.path.

There, `adapters` and `triton_kernels` would pass for other people's packages.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VLLM = ROOT / "tests" / "vllm"
sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != ROOT]

# What tests share is imported once by name. This folder does not stay on the path: its own folders
# (`transformers`!) would pass for other people's packages, too.
sys.path.append(str(ROOT / "tests"))
import bounds  # noqa: E402, F401
import tiny  # noqa: E402, F401

sys.path.pop()
sys.path.append(str(ROOT / "tests" / "tiers"))  # the servers that other folders' tests need, too


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Who runs tests side by side gives each worker whole files, whose tests share servers, and
    those of the longest folder first."""
    for item in items:
        long = item.path.parent == VLLM
        item.add_marker(pytest.mark.xdist_group("vllm" if long else str(item.path)))
        if item.name == "test_hostile_bytes":  # a contract's; who else runs it knows no such mark
            item.add_marker("slow")
    items.sort(key=lambda item: item.path.parent != VLLM)
