"""Let the kernel tests import what they share (`paged_cases`, `aot`) from this folder."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-baseline", action="store_true", help="rewrite aot_baseline.json")
