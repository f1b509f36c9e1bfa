"""SGLang's OpenAI server, as `tierloom sglang --exec` starts it: on a GPU, or by stand-ins."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tierloom.adapters.demo.engine_server import EngineServer
from tierloom.adapters.demo.smollm2 import NAME
from tierloom.stages.errors import TierloomError

FLUSH_S = 60.0
"""Seconds that SGLang may be busy after an answer."""

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
OPTIONS = (
    "--page-size", "32", "--context-length", "4096", "--enable-cache-report",
    "--skip-server-warmup", "--log-level", "warning",
)  # fmt: skip
HICACHE = ("--hicache-storage-prefetch-policy", "wait_complete")
PATIENT = {"graphs.store.deadline": "60 s", "graphs.retrieve.deadline": "60 s"}
"""The demo shows what is stored on a busy machine too, where an engine would rather compute."""

# What SGLang needs where there is no GPU: the stand-ins for CUDA's copies, one thread (more spin
# when anything else runs), and float32 (without AMX bfloat16 is ten times slower).
CPU_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
CPU_OPTIONS = (
    "--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32",
    "--disable-cuda-graph", "--disable-overlap-schedule", "--mem-fraction-static", "0.2",
    "--max-total-tokens", "4608",
)  # fmt: skip
CPU_HICACHE = (
    "--hicache-ratio", "2", "--hicache-io-backend", "direct", "--hicache-mem-layout", "layer_first",
)  # fmt: skip


class SglangServer(EngineServer):
    """One SGLang server."""

    def __init__(
        self, model: Path, settings: Mapping[str, Any], log: Path, *, linker: bool, gpu: bool
    ) -> None:
        """`settings`: what `tierloom sglang --set` takes."""
        ours = ["--linker"] if linker else ["--set", "prefetch_threshold=32"]
        for key, value in (PATIENT | dict(settings)).items():
            ours += ["--set", f"{key}={value}"]
        options = [*OPTIONS, *(() if gpu else CPU_OPTIONS)]
        if not linker:
            options += [*HICACHE, *(() if gpu else CPU_HICACHE)]
        command = [
            sys.executable, "-m", "tierloom.adapters.cli", "sglang", *ours, "--exec", "--",
            "--model-path", str(model), "--served-model-name", NAME, *options,
        ]  # fmt: skip
        environment = ENVIRONMENT | {"SGLANG_DISABLED_MODEL_ARCHS": _other_models()}
        super().__init__(command, environment | ({} if gpu else CPU_ENVIRONMENT), log)

    def warm_up(self, more: Mapping[str, Any]) -> None:
        """Twice, so that loading is warm as well."""
        super().warm_up(more)
        self.flush()
        super().warm_up(more)

    def flush(self) -> None:
        """Empty SGLang's own caches. Raises TierloomError when it does not become idle."""
        end = time.monotonic() + FLUSH_S
        while time.monotonic() < end:
            with contextlib.suppress(OSError, HTTPException):
                if self.send("POST", "/flush_cache") == 200:
                    return
            time.sleep(0.25)
        raise TierloomError(f"SGLang did not empty its caches within {FLUSH_S:.0f} s")


def _other_models() -> str:
    """SGLang's modules of models that are not the demo's: it would import all of them at its start,
    which takes longer than all else."""
    spec = importlib.util.find_spec("sglang")
    folders = [Path(f) for f in spec.submodule_search_locations or ()] if spec else []
    names = {file.stem for folder in folders for file in folder.glob("srt/models/*.py")}
    return ",".join(sorted(names - {"llama", "registry", "__init__"}))
