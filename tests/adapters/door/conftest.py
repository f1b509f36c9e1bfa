"""Pipelines over small tensors, and certificates."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from servers import Certificates

pytest.register_assert_rewrite("door_rig")
sys.path.append(str(Path(__file__).parent))
import door_rig  # noqa: E402, F401


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))
