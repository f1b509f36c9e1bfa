"""`tierloom pd`: prefillers, decoders and the proxy over them, on this machine. Imports no vLLM."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError
from urllib.request import urlopen

from tierloom.stages.errors import ConfigError, TierloomError

_ROLES = {"prefill": ("kv_producer", "prefiller"), "decode": ("kv_both", "decoder")}
"""Of each role of the proxy's: vLLM's, and the preset."""
_FIRST_PORT = {"prefill": 100, "decode": 200}
"""From the proxy's port on."""
_END = 20.0
"""Seconds that engines have to end."""


class PlannedEngine(NamedTuple):
    """An engine that is to be started."""

    role: str
    port: int
    command: list[str]
    env: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __str__(self) -> str:
        """For a shell."""
        env = [f"{name}={value}" for name, value in self.env.items()]
        return shlex.join([*(["env", *env] if env else []), *self.command])


def planned(
    model: str, counts: dict[str, int], port: int, devices: Sequence[str], arguments: Sequence[str]
) -> list[PlannedEngine]:
    """`counts`: engines of each role. `devices`: of the GPUs, one for each engine in turn. A folder
    that TIERLOOM_DIR names is all engines': each has its own in it, at the same place next time."""
    folder = os.environ.get("TIERLOOM_DIR", "")
    engines: list[PlannedEngine] = []
    for role, count in counts.items():
        kv_role, preset = _ROLES[role]
        kv = {
            "kv_connector": "TierloomConnector", "kv_role": kv_role,
            "kv_connector_extra_config": {"tierloom.config": preset},
        }  # fmt: skip
        for i in range(count):
            env = {"TIERLOOM_DIR": f"{folder}/{role}-{i}"} if folder else {}
            if devices:
                env["CUDA_VISIBLE_DEVICES"] = devices[len(engines) % len(devices)]
            at = port + _FIRST_PORT[role] + i
            command = [
                sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model,
                "--host", "127.0.0.1", "--port", str(at), "--kv-transfer-config", json.dumps(kv),
                *arguments,
            ]  # fmt: skip
            engines.append(PlannedEngine(role, at, command, env))
    return engines


def run_pd(
    engines: Sequence[PlannedEngine], *, start: bool, wait: float, say: Callable[[str], None],
    serve: Callable[[list[str], list[str]], None],
) -> None:  # fmt: skip
    """Print the commands and, with `start`, run them until `serve`, the proxy, ends. `wait`:
    seconds until all answer. Raises TierloomError if one does not."""
    for engine in engines:
        say(str(engine))
    if not start:
        return
    children: list[subprocess.Popen[bytes]] = []
    logs = Path(tempfile.mkdtemp(prefix="tierloom-pd-"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        for engine in engines:
            with (logs / f"{engine.role}-{engine.port}.log").open("wb") as log:
                say(f"{engine.role} engine at {engine.url}, log {log.name}")
                child = subprocess.Popen(
                    engine.command, env=os.environ | engine.env, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
                children.append(child)
        end = time.monotonic() + wait
        for engine, child in zip(engines, children, strict=True):
            _until_up(engine, child, end, logs)
        urls = {role: [e.url for e in engines if e.role == role] for role in _ROLES}
        serve(urls["prefill"], urls["decode"])
    finally:
        _stop(children)


def _until_up(
    engine: PlannedEngine, child: subprocess.Popen[bytes], end: float, logs: Path
) -> None:
    while True:
        with contextlib.suppress(URLError, OSError), urlopen(f"{engine.url}/health", timeout=5):
            return
        why = f"ended with status {child.poll()}" if child.poll() is not None else ""
        if not why and time.monotonic() > end:
            why = "does not answer yet; a longer --wait may help"
        if why:
            raise TierloomError(f"pd: {engine.role} engine {engine.url} {why}; see {logs}")
        time.sleep(0.2)


def _stop(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """All of them, with what they started; those that do not end by themselves are killed."""
    for child in children:
        if child.poll() is None:
            child.terminate()
    end = time.monotonic() + _END
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.1, end - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def parsed_devices(text: str) -> list[str]:
    """'0,1' -> ['0', '1']. Raises ConfigError."""
    devices = [part.strip() for part in text.split(",")] if text else []
    if not all(devices):
        raise ConfigError(f"--devices {text}: write them as in 0,1,2,3")
    return devices
