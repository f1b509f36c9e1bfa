"""`make demo-cluster`: how its servers know of each other, what it makes of answers, and a run."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import real_model
from servers import redis_program

from tierloom.adapters.demo import engine_server, on_cluster
from tierloom.adapters.demo.directory_server import own_directory
from tierloom.adapters.demo.engine_server import HOST, EngineServer
from tierloom.adapters.demo.on_cluster import OnCluster
from tierloom.adapters.demo.run import Pair, disks, verdict_on
from tierloom.adapters.demo.screen import Answer
from tierloom.pipeline.config.load import load_config
from tierloom.stages.errors import TierloomError

ROOT = Path(__file__).resolve().parents[3]
VENV = ROOT / ".venv-vllm"


def reply(hit: int = 0, text: str = "a", ttft_s: float = 8.0) -> Answer:
    return Answer(text, ttft_s, 2287, hit)


def judged(*kept: Answer) -> tuple[dict[str, Any], str, str]:
    pairs = [Pair(answer, kept[0]) for answer in kept]
    verdict = verdict_on(pairs, OnCluster.restarted)
    shown, figures = OnCluster.__new__(OnCluster).figures(pairs, verdict)
    return figures, verdict.wrong, shown


GOOD = [reply(), reply(2272, ttft_s=0.2), reply(2240, ttft_s=0.4), reply(2272, ttft_s=0.2)]


def test_figures_of_a_good_run() -> None:
    figures, wrong, shown = judged(*GOOD)
    assert figures == {
        "prompt_tokens": 2287, "peer_hit_tokens": 2240, "cold_ttft_s": 8.0, "own_hit_ttft_s": 0.2,
        "peer_hit_ttft_s": 0.4, "identical": True, "identical_after_kill": True,
    }  # fmt: skip
    assert wrong == ""
    assert "(20 times)" in shown
    assert "Texts identical" in shown


def test_other_answers_after_the_kill_are_no_good_run() -> None:
    figures, wrong, _ = judged(*GOOD[:3], reply(2272, "b"))
    assert (figures["identical"], figures["identical_after_kill"]) == (False, False)
    assert "answer 4 " in wrong


@pytest.mark.server
def test_servers_find_each_other_through_a_directory(tmp_path: Path) -> None:
    redis_program()
    with on_cluster._known_to_each_other("cluster", tmp_path, tmp_path / "log") as made:
        config, options, how = made
        at = [load_config(config, {**disks(config, tmp_path), **each}) for each in options]
        serve = [spec.serve for spec in at]
        assert (config, [s.directory for s in serve if s]) == ("cluster", [url_in(at[0])] * 2)
        assert url_in(at[0]) == url_in(at[1])
        assert "redis" in how or "valkey" in how
        port = int(url_in(at[0]).rpartition(":")[2].partition("/")[0])
        socket.create_connection((HOST, port), 5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port), 5)


def url_in(spec: Any) -> str:
    (url,) = spec.tiers["near"].options.addresses
    return str(url)


@pytest.mark.parametrize("config", ["cluster", "peer"])
def test_servers_find_each_other_by_a_list(config, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(on_cluster, "redis_binary", lambda: None)
    with on_cluster._known_to_each_other(config, tmp_path, tmp_path / "log") as made:
        named, options, how = made
        at = [load_config(named, each) for each in options]
    listens = [spec.serve.listen for spec in at if spec.serve]
    assert (named, how) == ("peer", "by a list of both")
    assert len(set(listens)) == 2
    assert [spec.tiers["near"].options.addresses for spec in at] == [listens] * 2


def test_a_directory_that_does_not_start_is_told(tmp_path: Path) -> None:
    made = own_directory(sys.executable, tmp_path, tmp_path / "log")
    with pytest.raises(TierloomError, match="did not start"), made:
        pass


def test_a_kill_ends_the_server_and_what_it_started(tmp_path: Path) -> None:
    child = "import time; time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with EngineServer([sys.executable, "-c", code], {}, tmp_path / "log") as server:
        assert server._process is not None
        group = server._process.pid
        server.kill()
        assert not server.runs
        server.kill()
        end = time.monotonic() + 10
        while engine_server._group_lives(group) and time.monotonic() < end:
            time.sleep(0.02)
        assert not engine_server._group_lives(group)


@real_model
@pytest.mark.campaign
@pytest.mark.timeout(900)
def test_the_demo_of_two_servers(tmp_path: Path) -> None:
    if not (VENV / ".ready").exists():
        pytest.skip("no vLLM: make vllm")
    file = tmp_path / "figures.json"
    command = [str(VENV / "bin" / "python"), "-m", on_cluster.__name__, "--json", str(file)]
    done = subprocess.run(command, cwd=tmp_path, check=False, text=True, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stdout
    figures = json.loads(file.read_text())
    assert figures["identical"]
    assert figures["identical_after_kill"]
    assert min(figures["prompt_tokens"], figures["peer_hit_tokens"]) >= 2048
