"""`tierloom sglang`: the flags by which SGLang uses tierloom, and SGLang started with them.

Imports neither SGLang nor torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tierloom.adapters.cli.file_commands import set_options
from tierloom.adapters.sglang.settings import chunked, hicache_config, linker_config
from tierloom.stages.errors import ConfigError

TESTED = "0.5.23"
"""The version of SGLang that the adapter is written for and tested with."""

_TAKEN = {
    "hicache_storage_pass_prefix_keys", "prefetch_threshold", "prefetch_timeout_base",
    "prefetch_timeout_per_ki_token", "tp_lcm_size",
}  # fmt: skip
"""Keys of the extra config that SGLang takes out of it, before the backend reads it."""


def hicache_flags(extra: Mapping[str, Any], page: int) -> list[str]:
    """For HiCache, with tierloom below SGLang's host memory."""
    ours = {
        "backend_name": "tierloom",
        "module_path": "tierloom.adapters.sglang.hicache",
        "class_name": "TierloomHiCache",
        "interface_v1": 1,
        "hicache_storage_pass_prefix_keys": True,
    }
    return [
        "--page-size", str(page), "--enable-hierarchical-cache",
        "--hicache-storage-backend", "dynamic",
        "--hicache-storage-backend-extra-config", json.dumps({**ours, **extra}),
    ]  # fmt: skip


def linker_flags(extra: Mapping[str, Any], page: int) -> list[str]:
    """For the cache linker, which has no host memory of SGLang's."""
    ours = {
        "linker": "TierloomLinker",
        "linker_module_path": "tierloom.adapters.sglang.linker",
        "linker_extra_config": dict(extra),
    }
    return [
        "--page-size", str(page), "--enable-unified-cache-external-linker",
        "--unified-cache-external-linker-backend", "dynamic",
        "--unified-cache-external-linker-config", json.dumps(ours),
    ]  # fmt: skip


def extra_config(config: str, settings: Sequence[str]) -> dict[str, Any]:
    """The options as SGLang hands them to the adapter. `settings`: KEY=VALUE, the value as JSON or
    else as it is. Raises ConfigError."""
    if config.endswith((".yaml", ".yml")):
        config = str(Path(config).absolute())
    return {"tierloom.config": config, **set_options(settings)}


def refuse_mistakes(extra: Mapping[str, Any], page: int, *, linker: bool) -> None:
    """Raise ConfigError for what the adapter would refuse of its settings when SGLang starts."""
    if linker:
        said = linker_config(extra)
        said.pipeline(chunked(said, page, chunk=page))
        return
    ours = {k: v for k, v in extra.items() if k not in _TAKEN}
    said = hicache_config({"interface_v1": 1, **ours})
    said.pipeline(chunked(said, page))


def run_sglang(
    config: str, settings: Sequence[str], page: int, arguments: Sequence[str], *, linker: bool,
    execute: bool, check: bool,
) -> int:  # fmt: skip
    """Print the flags, start SGLang with them, or say what would be refused; the exit status.
    Raises ConfigError."""
    extra = extra_config(config, settings)
    if check:
        from tierloom.adapters.cli.sglang_check import run_check

        return run_check(extra, page, linker=linker)
    refuse_mistakes(extra, page, linker=linker)
    flags = (linker_flags if linker else hicache_flags)(extra, page)
    if execute:
        _start([*flags, *arguments])
    if arguments:
        raise ConfigError(f"{shlex.join(arguments)}: arguments of SGLang's go with --exec alone")
    print(shlex.join(flags))  # noqa: T201
    return 0


def _start(arguments: Sequence[str]) -> NoReturn:
    """Become SGLang's server."""
    if importlib.util.find_spec("sglang") is None:
        raise ConfigError(f"SGLang is not installed for {sys.executable}")
    command = [sys.executable, "-m", "sglang.launch_server", *arguments]
    os.execv(sys.executable, command)
