"""vLLM's OpenAI-compatible server as a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING, Any

from driver_process import EngineError, end_group
from launch import environment, start

if TYPE_CHECKING:
    from pathlib import Path


class Server:
    """vLLM's OpenAI-compatible server, on a free loopback port; stopped by its pid."""

    def __init__(
        self, model: Path, kv: dict[str, Any], log: Path, *, env: dict[str, str] | None = None,
        **flags: Any,
    ) -> None:  # fmt: skip
        """`flags` are vLLM's own; one that is None is left out."""
        self.log = log
        self.door = ""
        """Its HTTP door's URL, where it has one."""
        self._tmp = tempfile.mkdtemp(prefix="vllm-")  # vLLM leaves sockets and files behind
        self.port = free_port()
        flags = {
            "model": model,
            "host": "127.0.0.1",
            "port": self.port,
            "served-model-name": "tiny",
            "dtype": "float32",
            "block-size": 32,
            "max-model-len": 4096,
            "kv-cache-memory-bytes": 64 << 20,
            "max-num-seqs": 8,
            "kv-transfer-config": json.dumps(kv),
        } | flags
        given = {flag: value for flag, value in flags.items() if value is not None}
        words = [w for flag, value in given.items() for w in (f"--{flag}", str(value))]
        words += ["--enforce-eager", "--enable-prompt-tokens-details", "--no-enable-prefix-caching"]
        with log.open("ab") as out:
            self._child = start(
                "vllm.entrypoints.openai.api_server",
                *words,
                env=environment(TMPDIR=self._tmp, **(env or {})),
                out=out,
                err=out,
                cwd=log.parent,
            )

    def wait_ready(self, timeout: float = 240.0) -> None:
        """Until it answers; EngineError when it ends before that."""
        end = time.monotonic() + timeout
        while True:
            with contextlib.suppress(OSError):
                if self.get("/health") == "":
                    return
            if self._child.poll() is not None or time.monotonic() > end:
                raise EngineError(f"the server did not come up; see {self.log}")
            time.sleep(0.3)

    def get(self, path: str) -> str:
        return self._call("GET", path, None)

    def post(self, path: str) -> str:
        return self._call("POST", path, {})

    def complete(self, tokens: list[int], **body: Any) -> dict[str, Any]:
        """Greedy; token ids and the number of cached tokens of the answer."""
        asked = {"model": "tiny", "prompt": tokens, "max_tokens": 8, "temperature": 0,
                 "ignore_eos": True, "return_token_ids": True} | body  # fmt: skip
        said = json.loads(self._call("POST", "/v1/completions", asked))
        details = said["usage"].get("prompt_tokens_details") or {}
        return {"ids": said["choices"][0]["token_ids"], "cached": details.get("cached_tokens") or 0}

    def metric(self, name: str) -> float:
        """Sum over the labels of one counter or gauge of `/metrics`."""
        lines = [ln for ln in self.get("/metrics").splitlines() if ln.split("{")[0] == name]
        assert lines, f"no {name} at /metrics"
        return sum(float(ln.rsplit(" ", 1)[1]) for ln in lines)

    def _call(self, method: str, path: str, body: Any) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=100)
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(method, path, sent, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
            if response.status != 200:
                raise EngineError(f"{method} {path}: {response.status} {text}")
            return text
        finally:
            connection.close()

    def close(self, timeout: float = 30.0) -> int | None:
        """SIGTERM, as an operator does; its exit status, None when it had to be killed."""
        status = None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._child.wait(timeout)
        end_group(self._child)
        shutil.rmtree(self._tmp, ignore_errors=True)
        return status


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
