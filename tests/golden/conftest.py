"""What is written, and how, is in `golden_cases.py`, which `make.py` imports as well."""

from __future__ import annotations

import sys
from pathlib import Path

# At the end: this folder has a `conftest`, which tests of a pipeline must not import for theirs.
sys.path.append(str(Path(__file__).parent))
