"""Two real engines under `tierloom proxy` answer as one alone does, to the `openai` package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from launch import PYTHON, environment
from serving import Server

if TYPE_CHECKING:
    from collections.abc import Iterator

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
CLIENT = Path(__file__).with_name("openai_answers.py")


@pytest.fixture
def servers(llama: Path, logs: Path, tmp_path: Path) -> Iterator[list[Server]]:
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    flags: dict[str, Any] = {"kv-transfer-config": None, "chat-template": template}
    up = [Server(llama, {}, logs / f"{role}.log", **flags) for role in ("prefill", "decode")]
    try:
        for server in up:
            server.wait_ready()
        yield up
    finally:
        for server in up:
            server.close()


def answers(url: str) -> list[Any]:
    done = subprocess.run(
        [str(PYTHON), str(CLIENT), url], env=environment(), capture_output=True, text=True,
        timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@pytest.mark.campaign
def test_answers_are_those_of_an_engine_alone(servers: list[Server]) -> None:
    prefill, decode = (f"http://127.0.0.1:{server.port}" for server in servers)
    command = [sys.executable, "-m", "tierloom.adapters.cli", "proxy", "--port", "0"]
    command += ["--prefill", prefill, "--decode", decode, "--local-under", "100"]
    proxy = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert proxy.stdout is not None
        url = proxy.stdout.readline().removeprefix("listening on ").strip()
        got, alone = answers(url), answers(decode)
    finally:
        proxy.terminate()
        log = proxy.communicate(timeout=60)[1]
    assert got == alone
    assert len(got) == 1 + 4 * 11 + 3
    assert log.count("way=after status=200") >= 8
    assert servers[0].metric("vllm:request_success_total") >= 8
