"""Keep the checkout's root off sys.path.

There, `adapters` and `triton_kernels` would pass for other people's packages.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != ROOT]
