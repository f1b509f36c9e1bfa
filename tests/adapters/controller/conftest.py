"""A controller over a directory that engines of this process tell."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
for folder in (Path(__file__).parent, TESTS / "adapters" / "door", TESTS / "stages" / "tiers"):
    sys.path.append(str(folder))
pytest.register_assert_rewrite("door_rig", "control_rig")
import control_rig  # noqa: E402
import door_rig  # noqa: E402, F401


@pytest.fixture(params=["redis", "hosted"])
def fleet(request: pytest.FixtureRequest, tmp_path: Path):
    with control_rig.fleet(request.param, tmp_path) as made:
        yield made


@pytest.fixture
def rig(tmp_path: Path):
    with control_rig.fleet("redis", tmp_path) as made:
        yield made
