"""`make demo-sglang` without SGLang: what it makes of answers, and how it starts its servers."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tierloom.adapters.demo import sglang_server
from tierloom.adapters.demo.engine_server import HOST
from tierloom.adapters.demo.on_sglang import OnSglang
from tierloom.adapters.demo.run import Pair, verdict_on
from tierloom.adapters.demo.screen import Answer
from tierloom.adapters.demo.sglang_server import SglangServer
from tierloom.stages.errors import TierloomError

if TYPE_CHECKING:
    from collections.abc import Iterator


def reply(hit: int = 0, text: str = "a", ttft_s: float = 8.0) -> Answer:
    return Answer(text, ttft_s, 2287, hit)


COLD = reply()
GOOD = [(COLD, COLD), (reply(2272, ttft_s=0.2), COLD), (reply(2240, ttft_s=0.4), COLD),
        (reply(2208, ttft_s=0.1), COLD)]  # fmt: skip


def judged(given: list[tuple[Answer, Answer]]) -> tuple[dict[str, Any], str, str]:
    pairs = [Pair(*pair) for pair in given]
    verdict = verdict_on(pairs, OnSglang.restarted)
    shown, figures = OnSglang.__new__(OnSglang).figures(pairs, verdict)
    return figures, verdict.wrong, shown


def test_figures_of_a_good_run() -> None:
    figures, wrong, shown = judged(GOOD)
    assert figures == {
        "prompt_tokens": 2287, "hit_tokens": 2272, "restart_hit_tokens": 2240,
        "linker_hit_tokens": 2208, "cold_ttft_s": 8.0, "hit_ttft_s": 0.2, "restart_ttft_s": 0.4,
        "identical": True,
    }  # fmt: skip
    assert wrong == ""
    assert "(40 times sooner)" in shown
    assert "Texts identical" in shown


@pytest.mark.parametrize(
    ("at", "kept", "identical", "words"),
    [
        (1, reply(2272, "b"), False, "answer 2 "),
        (3, reply(2272, "b"), False, "answer 4 "),
        (1, reply(), True, "not found again"),
        (2, reply(), True, "not found again"),
        (3, reply(), True, "not found again"),
    ],
)
def test_what_is_wrong_with_a_run(at, kept, identical, words) -> None:
    given = [*GOOD]
    given[at] = (kept, COLD)
    figures, wrong, _ = judged(given)
    assert (figures["identical"], words in wrong) == (identical, True)


@pytest.mark.parametrize("linker", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_a_gpu_is_used_where_there_is_one(linker, gpu) -> None:
    server = SglangServer(Path("m"), {"tierloom.config": "x"}, Path("log"), linker=linker, gpu=gpu)
    command, environment = server._command, server._environment
    ours, theirs = command[: command.index("--")], command[command.index("--") :]
    assert ("--device" not in theirs, "SGLANG_USE_CPU_ENGINE" not in environment) == (gpu, gpu)
    assert ("--linker" in ours, "tierloom.config=x" in ours) == (linker, True)
    assert any(word.startswith("--hicache") for word in theirs) != linker
    assert theirs[-4:] == ["--host", HOST, "--port", str(server.port)]


@pytest.fixture
def answering() -> Iterator[list[int]]:
    """Answers that a server gives in turn, the last one again and again; first its port."""
    given: list[int] = []

    class Flushes(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(given.pop(0) if len(given) > 1 else given[0])
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    http = HTTPServer((HOST, 0), Flushes)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    given.append(http.server_port)
    yield given
    http.shutdown()
    http.server_close()


def test_a_flush_waits_until_sglang_is_idle(answering, monkeypatch) -> None:
    server = SglangServer(Path("m"), {}, Path("log"), linker=False, gpu=False)
    server.port = answering.pop()
    answering += [400, 400, 200]
    server.flush()
    assert answering == [200]
    answering[:] = [400]
    monkeypatch.setattr(sglang_server, "FLUSH_S", 0.3)
    with pytest.raises(TierloomError, match="did not empty"):
        server.flush()


def test_loading_is_warm_before_it_is_timed(monkeypatch) -> None:
    server = SglangServer(Path("m"), {}, Path("log"), linker=False, gpu=False)
    done: list[str] = []
    monkeypatch.setattr(server, "ask", lambda *_: done.append("ask"))
    monkeypatch.setattr(server, "flush", lambda: done.append("flush"))
    server.warm_up({})
    assert done == ["ask", "flush", "ask"]
