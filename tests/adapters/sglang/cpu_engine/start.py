"""Run by every Python of `.venv-sglang` when it starts; acts where SGLANG_USE_CPU_ENGINE=1 alone.

`install.py` copies this folder into site-packages and names this module in a `.pth` file there, for
SGLang starts processes of its own, and each of them needs the stand-ins before it imports SGLang.
A `sitecustomize.py` would not do: some systems have one already, and the first one found wins.

What stands in for what:
- `absent_modules.py`: modules of GPU kernels and pictures that are imported and never used.
- `host_copies.py`: SGLang's CUDA copies between device and host memory, and page-locking.
All else is SGLang's own code as it is released: scheduler, radix tree, HiCache, models.
"""

from __future__ import annotations

import os

if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
    from cpu_engine import absent_modules, host_copies

    absent_modules.stand_in()
    host_copies.stand_in()
