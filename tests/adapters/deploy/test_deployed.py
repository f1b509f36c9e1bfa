"""Commands of configs/deploy as processes, with their own arguments; and what two engines of a file
do over its store, without a model."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pools
import pytest
import torch
from deployed import FOLDER, Command, commands, composed, transfer_of
from processes import Process, free_port

import tierloom
from tierloom.adapters.vllm.exchange.settings import configured
from tierloom.pipeline.pipeline import Pipeline

SERVED = [c for c in commands() if c.words[0] in ("serve", "proxy")]
TOKEN = "a-token-of-this-test"
_PORT = re.compile(r"^((?:--(?:listen|http|port)=)?(?:\w+://)?(?:[\d.]+:)?)\d{4,5}$")


def here(text: str, folder: Path) -> str:
    """The same in this test's own place: its folders, free ports, less memory."""
    text = re.sub(r"(/run/secrets/(?:tierloom/)?|%d/)token", str(folder / "token"), text)
    text = text.replace("/run/tierloom/", f"{folder}/").replace("/var/lib/tierloom", str(folder))
    return _PORT.sub(r"\g<1>0", text)


@contextmanager
def started(command: Command, folder: Path, **more: str) -> Iterator[list[str]]:
    """The addresses that it tells of."""
    (folder / "token").write_text(TOKEN)
    words = [here(word, folder) for word in command.words]
    environment = {name: here(value, folder) for name, value in command.environment.items()}
    environment |= {"TIERLOOM_MEMORY": "256 MiB", "TIERLOOM_DISK": "256 MiB", **more}
    child = subprocess.Popen(
        [sys.executable, "-m", "tierloom", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | environment, text=True,
    )  # fmt: skip
    try:
        urls: list[str] = []
        wanted = 1 if command.words[0] == "proxy" else sum("listen" in w for w in words) + 1
        while len(urls) < wanted:
            line = child.stdout.readline()  # type: ignore[union-attr]
            assert line, child.stderr.read()  # type: ignore[union-attr]
            urls.append(line.removeprefix("listening on ").strip())
        yield urls
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 0
    finally:
        child.kill()
        child.communicate(timeout=20)


def asked(url: str, path: str, token: str = "") -> int:
    address = re.sub(r"//0\.0\.0\.0:", "//127.0.0.1:", url)
    request = urllib.request.Request(address + path)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("command", SERVED, ids=[c.of for c in SERVED])
def test_a_command_runs_and_is_alive(command: Command, tmp_path: Path) -> None:
    with started(command, tmp_path) as urls:
        assert asked(urls[-1], "/livez") == 200
        if command.words[0] == "serve":
            assert asked(urls[-1], "/readyz") == 200
            assert asked(urls[-1], "/metrics") == 401
            assert asked(urls[-1], "/metrics", TOKEN) == 200


def test_systemd_is_told_of_its_life(tmp_path: Path) -> None:
    """Ready, alive twice in each period, about to end."""
    (command,) = (c for c in SERVED if c.of == "tierloom.service")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(20)
        asks = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        with started(command, tmp_path, **asks):
            said = [sock.recv(100) for _ in range(6)]
        assert b"READY=1" in said
        assert said.count(b"WATCHDOG=1") == 5
        while (last := sock.recv(100)) == b"WATCHDOG=1":
            pass
        assert last == b"STOPPING=1"


def test_a_watchdog_of_another_process_is_not_answered(tmp_path: Path) -> None:
    (command,) = (c for c in SERVED if c.of == "kubernetes.yaml")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        asks = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "100000"}
        asks["WATCHDOG_PID"] = "1"  # another process is watched
        with started(command, tmp_path, **asks):
            time.sleep(0.3)
            sock.settimeout(0)
            assert sock.recv(100) == b"READY=1"
            with pytest.raises(BlockingIOError):
                sock.recv(100)


def engine(service: dict[str, Any], folder: Path, caches: list[Any]) -> Pipeline:
    """The pipeline that the connector of a service opens."""
    extra = json.loads(here(json.dumps(transfer_of(service)["kv_connector_extra_config"]), folder))
    spec = configured(extra).pipeline()
    layout = tierloom.KVLayout.from_tensors(caches, order="2BNHD")
    return Pipeline(spec, layout, model="the same")


def test_what_one_engine_computes_the_other_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (command,) = (c for c in SERVED if c.of == "docker-compose.central.yaml store")
    services = composed(FOLDER / "docker-compose.central.yaml")["services"]
    monkeypatch.setenv("TIERLOOM_MEMORY", "64 MiB")
    caches = [torch.randn(2, 40, 16, 2, 64).bfloat16() for _ in range(4)]
    back = [torch.zeros_like(c) for c in caches]
    tokens, slots = torch.arange(512), torch.arange(512)
    with started(command, tmp_path) as (store, _):
        url = store.replace("tcp://0.0.0.0", "tierloom://127.0.0.1")
        monkeypatch.setenv("TIERLOOM_SERVER", url)
        with engine(services["engine-1"], tmp_path, caches) as one:
            assert one.store(tokens, caches, slots).wait().tokens == 512
        with engine(services["engine-2"], tmp_path, back) as two:
            got = two.retrieve(tokens, back, slots).wait()
        assert (got.tokens, dict(got.tiers)) == (512, {"cold": 2}), got
    for there, kept in zip(back, caches, strict=True):
        error = (there[:, :32].float() - kept[:, :32].float()).pow(2).mean()
        assert 0 < error < 0.05, "encoded by cachegen, and decoded"


def test_the_image_of_the_store_has_what_it_imports(tmp_path: Path) -> None:
    """All that tierloom depends on and the Dockerfile does not install is not there."""
    text = (FOLDER / "Dockerfile").read_text().partition(" AS store\n")[2].partition("FROM ")[0]
    installed = set(re.findall(r'"([a-z_]+)>=', text))
    needs = {"lz4", "numba", "numpy", "torch", "triton", "zstandard", "transformers", "obstore"}
    absent = tmp_path / "absent"
    for name in needs - installed:
        (absent / name).mkdir(parents=True)
        (absent / name / "__init__.py").write_text("raise ModuleNotFoundError(__name__)")
    (command,) = (c for c in SERVED if c.of == "docker-compose.yaml tierloom")
    assert {"fastapi", "uvicorn", "anyio"} <= installed
    path = os.pathsep.join([str(absent), os.environ.get("PYTHONPATH", "")])
    with started(command, tmp_path, PYTHONPATH=path) as urls:
        assert asked(urls[-1], "/metrics", TOKEN) == 200


def test_both_engines_of_mooncake_find_what_the_pool_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The master of the file, and the pipelines of its engines, with less memory."""
    pools.require("mooncake")
    services = composed(FOLDER / "docker-compose.mooncake.yaml")["services"]
    ports = {number: free_port() for number in ("50052", "8080", "9004")}
    words = [
        re.sub(r"\d{4,5}$", lambda m: str(ports[m[0]]), word).replace("0.0.0.0", "127.0.0.1")
        for word in services["master"]["command"]
    ]
    monkeypatch.setenv("TIERLOOM_MEMORY", "64 MiB")
    monkeypatch.setenv("TIERLOOM_DISK", "64 MiB")
    monkeypatch.setenv("TIERLOOM_PREFILLERS", "127.0.0.1")
    monkeypatch.setenv("MC_TCP_BIND_ADDRESS", "127.0.0.1")
    (tmp_path / "token").write_text(TOKEN)
    for name in ("prefiller", "decoder"):
        text = services[name]["command"][-1].replace("30 GiB", "64 MiB")
        for port, free in ports.items():
            text = text.replace(f"master:{port}", f"127.0.0.1:{free}")
        services[name]["command"][-1] = text.replace("500 ms", "20 s")
    caches = [torch.randn(2, 8, 16, 2, 64).bfloat16() for _ in range(4)]
    back = [torch.zeros_like(c) for c in caches]
    tokens, slots = torch.arange(128), torch.arange(128)
    master = Process([str(pools.BIN / "mooncake_master"), *words], ports["50052"], tmp_path / "log")
    try:
        monkeypatch.setenv("TIERLOOM_DIR", str(tmp_path / "one"))
        with engine(services["prefiller"], tmp_path, caches) as one:
            kept = one.store(tokens, caches, slots).wait()
            assert kept.tiers["pool"] == 8, kept
            monkeypatch.setenv("TIERLOOM_DIR", str(tmp_path / "two"))
            with engine(services["decoder"], tmp_path, back) as two:
                got = two.retrieve(tokens, back, slots).wait()
        assert (got.tokens, got.tiers) == (128, {"pool": 8}), got
    finally:
        master.kill()
    assert all(map(torch.equal, caches, back))
