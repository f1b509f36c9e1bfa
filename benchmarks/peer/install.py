"""Install LMCache and tierloom into the virtual environment that runs this file.

    python3 -m venv .venv-peer
    .venv-peer/bin/python benchmarks/peer/install.py        (`make bench-peer` does both)

LMCache's wheel asks for CUDA's packages, gigabytes that nothing here uses, so it comes without its
dependencies, and those that its engine imports on a CPU are installed by name. A gigabyte in all,
most of which is torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "adapters"))
import engine_venv
from engine_venv import TORCH, run, step

LMCACHE = "lmcache==0.5.6"
NEEDED = (
    "aiofile", "aiofiles", "blake3", "aiohttp", "cachetools", "cryptography", "fastapi",
    "httptools", "msgspec", "nvtx", "opentelemetry-api", "opentelemetry-sdk",
    "opentelemetry-exporter-prometheus", "prometheus_client", "psutil", "py-cpuinfo", "pytest",
    "pyzmq", "redis", "safetensors", "sortedcontainers", "transformers>=5.4", "uvicorn",
)  # fmt: skip


def steps() -> None:
    step("pip", "--upgrade", "pip", "setuptools>=77")
    step("torch", TORCH, "numpy<=2.2.6")
    checkout = ("--no-build-isolation", "--editable", str(engine_venv.ROOT))
    step("tierloom", *checkout, TORCH, "numpy<=2.2.6")
    step("LMCache", "--no-deps", LMCACHE)
    step("what LMCache needs", *NEEDED, TORCH, "numpy<=2.2.6")
    run("import", [sys.executable, "-c", "import lmcache.v1.cache_engine, tierloom"])


if __name__ == "__main__":
    sys.exit(engine_venv.fill("LMCache", steps))
