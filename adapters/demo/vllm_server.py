"""vLLM's OpenAI-compatible server with the connector, for a CPU."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tierloom.adapters.demo.engine_server import EngineServer
from tierloom.adapters.demo.smollm2 import NAME

# What vLLM needs to run well on a small CPU: one thread that is not pinned (two pinned ones spin at
# barriers when anything else runs), and float32 (without AMX bfloat16 is ten times slower).
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONSAFEPATH": "1",
}
OPTIONS = (
    "--dtype", "float32", "--block-size", "32", "--enforce-eager", "--max-model-len", "4096",
    "--max-num-seqs", "4", "--kv-cache-memory-bytes", str(512 << 20),
    "--no-enable-prefix-caching", "--enable-prompt-tokens-details",
)  # fmt: skip


def vllm_version() -> str:
    """Of whichever package of vLLM is installed."""
    for package in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return "(unknown version)"


def connector(config: str, **options: Any) -> Mapping[str, Any]:
    """vLLM's `kv_transfer_config` with the pipeline `config` and its `options` by dotted path."""
    return {
        "kv_connector": "TierloomConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"tierloom.config": config, **options},
    }


class VllmServer(EngineServer):
    """One vLLM server."""

    def __init__(
        self, model: Path, transfer: Mapping[str, Any], log: Path, *,
        flags: Sequence[str] = (), environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        # not the `vllm` script: in vllm-cpu it asks for a package `vllm`, which is not there
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
            "--served-model-name", NAME, "--kv-transfer-config", json.dumps(transfer), *OPTIONS,
            *flags,
        ]  # fmt: skip
        super().__init__(command, {**ENVIRONMENT, **(environment or {})}, log)


class HandoffFigures:
    """What vLLM's `--worker-extension-cls` adds to a worker, so that it can be asked over HTTP."""

    def handoff_figures(self) -> dict[str, int]:
        """As `Handoff.figures`; nothing where nothing is handed over."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        pipelines = get_kv_transfer_group().worker.pipelines
        handoff = pipelines[0].pipeline.handoff if pipelines else None
        return handoff.figures() if handoff is not None else {}
