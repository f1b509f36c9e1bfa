"""What the benchmarks share is imported by name; the checkout's root is not on the path."""

from __future__ import annotations

import gc
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
    from collections.abc import Iterator
    from typing import Any

LOAD = pytest.StashKey[float]()


@pytest.fixture(scope="session")
def memcpy() -> Memcpy:
    """Two warm slabs, as large as the largest prompt."""
    return Memcpy()


@pytest.fixture(autouse=True)
def unmapped() -> Iterator[None]:
    """A closed pipeline's arena is unmapped with its last reference, which may be in a circle."""
    yield
    gc.collect()


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[LOAD] = machine()["load"]


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """The load before and after: figures of a busy machine are to be read as such."""
    now = machine()
    machine_info["tierloom"] = now | {"load": config.stash[LOAD], "load_after": now["load"]}
