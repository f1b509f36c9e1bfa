"""What the benchmarks share is imported by name; the checkout's root is not on the path."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

HERE = Path(__file__).resolve().parent
# In the root, `adapters` and `triton_kernels` would pass for other people's packages.
sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != HERE.parent]
sys.path.append(str(HERE))

from yardstick import Memcpy, machine  # noqa: E402

if TYPE_CHECKING:
    from typing import Any


@pytest.fixture(scope="session")
def memcpy() -> Memcpy:
    """Two warm slabs, as large as the largest prompt."""
    return Memcpy()


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["tierloom"] = machine()


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """The load at the end too: figures of a busy machine are to be read as such."""
    output_json["machine_info"]["tierloom"]["load_after"] = machine()["load"]
