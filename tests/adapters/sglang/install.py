"""Install SGLang and tierloom into the virtual environment that runs this file.

    python3 -m venv .venv-sglang
    .venv-sglang/bin/python tests/adapters/sglang/install.py        (`make sglang` does both)

SGLang is made for GPUs: of its 60 pinned requirements most are CUDA, gigabytes of it. What a Llama
on a CPU imports is named here, with the versions that it was tried with; for the rest, and for the
CUDA copies of HiCache, `cpu_engine/` stands in, where SGLANG_USE_CPU_ENGINE=1.

SGLang compiles the hash of its pages when it is first asked for: with g++, ninja and libssl-dev,
which are Debian's. Else this needs nothing but pip. The last line of what went wrong is left in
`<venv>/failed.txt`; the tests give it as the reason why they are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # python -P leaves it out
import engine_venv
from engine_venv import TORCH, run, step

SGLANG = [
    "sglang==0.5.23", "xgrammar==0.2.7", "apache-tvm-ffi==0.1.11", "compressed-tensors==0.18.0",
]  # fmt: skip
NEEDED = [
    "transformers==5.19.0", "openai==2.8.0", "numpy==2.4.6", "pydantic==2.14.4",
    "aiohttp==3.14.5", "fastapi==0.165.0", "uvicorn==0.54.0", "uvloop==0.23.0", "pyzmq==27.3.0",
    "requests==2.34.2", "python-multipart==0.0.34", "msgspec==0.23.0", "orjson==3.13.0",
    "pybase64==1.5.1", "dill==0.4.1", "jsonschema==4.26.0", "partial-json-parser==0.2.1.1.post7",
    "interegular==0.3.3", "sentencepiece==0.2.3", "einops==0.8.2", "pillow==13.0.0",
    "psutil==7.2.2", "setproctitle==1.3.8", "prometheus-client==0.26.0", "loguru==0.7.3",
    "tqdm==4.70.1", "packaging==26.4", "xxhash==4.1.0", "setuptools>=77",
]  # fmt: skip
TESTS = ("pytest", "pytest-timeout", "hypothesis")
"""`contract/` runs in this environment."""

LAZY = "--no-compile"
"""What is imported is compiled then: a tenth of SGLang and transformers; else a minute, 0.3 GB."""

CPU_ENGINE = Path(__file__).with_name("cpu_engine")
SITE = Path(sysconfig.get_paths()["purelib"])
CHECK = """
import tierloom
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.utils import get_hash_str
assert len(get_hash_str(list(range(8)), None, 4)) == 2
"""


def steps() -> None:
    begun = time.monotonic()
    compiler()
    step("pip", "--upgrade", "pip")
    step("torch", LAZY, TORCH)
    step("what SGLang needs", LAZY, *NEEDED, TORCH)
    step("SGLang", LAZY, "--no-deps", *SGLANG)
    engine_venv.tierloom({"numpy", "transformers"}, TESTS, (LAZY,))
    stand_in()
    print("page hash ...", end=" ", flush=True)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    run("page hash", [sys.executable, "-c", CHECK], SGLANG_USE_CPU_ENGINE="1")
    files = [f.lstat() for f in Path(sys.prefix).rglob("*")]
    size = sum(f.st_blocks for f in files) * 512 / 1e9
    print(f"done; all of it: {time.monotonic() - begun:.0f} s, {size:.2f} GB")


def compiler() -> None:
    """CalledProcessError when the hash of SGLang's pages could not be compiled here."""
    missing = [package for program, package in (("g++", "g++"), ("ninja", "ninja-build"))
               if not shutil.which(program)]  # fmt: skip
    if "g++" not in missing:
        header = ["g++", "-fsyntax-only", "-x", "c++", "-include", "openssl/evp.h", "/dev/null"]
        if subprocess.run(header, capture_output=True, check=False).returncode:
            missing.append("libssl-dev")
    if missing:
        why = f"SGLang compiles its page hash: apt-get install {' '.join(missing)}"
        raise subprocess.CalledProcessError(1, ["compiler"], stderr=why)


def stand_in() -> None:
    """Every process of this environment runs `cpu_engine/start.py` before anything else."""
    shutil.copytree(
        CPU_ENGINE, SITE / CPU_ENGINE.name, dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("__pycache__"),
    )  # fmt: skip
    (SITE / "cpu_engine.pth").write_text("import cpu_engine.start\n")


if __name__ == "__main__":
    sys.exit(engine_venv.fill("SGLang", steps))
