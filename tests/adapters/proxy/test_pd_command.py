"""`tierloom pd`: what it starts, and that it leaves nothing running. vLLM's server is a module that
serves as an engine does, of the same name."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from stub_engine import completion

PD = [sys.executable, "-m", "tierloom.adapters.cli", "pd"]
SERVER = """
import asyncio, sys, uvicorn
from stub_engine import StubEngine
if "--broken" in sys.argv:
    sys.exit("broken as told")
engine = StubEngine()
engine.port = int(sys.argv[sys.argv.index("--port") + 1])
uvicorn.run(engine.app, port=engine.port, log_level="critical")
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "vllm" / "entrypoints" / "openai"
    folder.mkdir(parents=True)
    (folder / "api_server.py").write_text(SERVER)
    path = [str(tmp_path), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "TMPDIR": str(tmp_path)}


def free_port() -> int:
    """That of a proxy, those of whose engines are free as well; below those that the kernel gives
    to whatever connects meanwhile."""
    while True:
        port = random.randrange(10_000, 30_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for each in (port, port + 100, port + 200):
                stack.enter_context(socket.create_server(("127.0.0.1", each)))
            return port


def test_the_commands_are_printed(env) -> None:
    words = ["--prefill", "2", "--decode", "1", "M", "--no-start", "--devices", "0,1", "--", "--x"]
    words.append("a b")
    env["TIERLOOM_DIR"] = "/a b"
    said = subprocess.run([*PD, *words], env=env, capture_output=True, text=True, check=True).stdout
    lines = [shlex.split(line) for line in said.splitlines()]
    assert [line[:3] for line in lines] == [
        ["env", "TIERLOOM_DIR=/a b/prefill-0", "CUDA_VISIBLE_DEVICES=0"],
        ["env", "TIERLOOM_DIR=/a b/prefill-1", "CUDA_VISIBLE_DEVICES=1"],
        ["env", "TIERLOOM_DIR=/a b/decode-0", "CUDA_VISIBLE_DEVICES=0"],
    ]
    ports, roles = [], []
    for line in lines:
        assert line[-2:] == ["--x", "a b"]
        ports.append(line[line.index("--port") + 1])
        kv = json.loads(line[line.index("--kv-transfer-config") + 1])
        roles.append((kv["kv_role"], kv["kv_connector_extra_config"]["tierloom.config"]))
    assert ports == ["8100", "8101", "8200"]
    assert roles == [("kv_producer", "prefiller")] * 2 + [("kv_both", "decoder")]


@pytest.mark.slow
def test_all_is_started_and_ended(env) -> None:
    port = free_port()
    command = [*PD, "M", "--port", str(port)]
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    try:
        while not (line := child.stdout.readline()).startswith("listening"):
            assert line, "it has ended"
        body = {"model": "stub", "prompt": "x" * 9000, "max_tokens": 3}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=20)
        assert answer.json() == completion(body)
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 0
        for each in (port, port + 100, port + 200):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", each))
    finally:
        child.kill()
        child.communicate()


def test_an_engine_that_does_not_come_up_ends_it(env) -> None:
    command = [*PD, "M", "--port", str(free_port()), "--", "--broken"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ended with status 1; see" in done.stderr
    assert "Traceback" not in done.stderr
