"""Keep the checkout's root off sys.path.

There, `adapters` and `triton_kernels` would pass for other people's packages.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VLLM = ROOT / "tests" / "vllm"
sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != ROOT]

# What tests share is imported once by name. This folder does not stay on the path: its own folders
# (`transformers`!) would pass for other people's packages, too.
sys.path.append(str(ROOT / "tests"))
import bounds  # noqa: E402, F401
import fake_cuda  # noqa: E402, F401
import tiny  # noqa: E402, F401

sys.path.pop()
sys.path.append(str(ROOT / "tests" / "tiers"))  # the servers that other folders' tests need, too


def pytest_collection_modifyitems(items):
    """The folder that takes longest goes first: tests run side by side, and end together so.

    A contract cannot mark its tests: whoever else runs it knows no such mark.
    """
    items.sort(key=lambda item: item.path.parent != VLLM)
    for item in items:
        if item.name == "test_hostile_bytes":
            item.add_marker("slow")
