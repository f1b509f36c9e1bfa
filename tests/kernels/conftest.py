"""Let the kernel tests import what they share (`paged_cases`, `aot`) from this folder."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
