"""`make demo-vllm` without vLLM: what it makes of answers, and that no server is left."""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tierloom.adapters.demo import engine_server as demo_server
from tierloom.adapters.demo.on_vllm import SKIP_LOAD, OnVllm
from tierloom.adapters.demo.run import Pair, verdict_on
from tierloom.adapters.demo.screen import Answer
from tierloom.adapters.demo.vllm_server import VllmServer
from tierloom.stages.errors import TierloomError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def serving() -> Iterator[Callable[..., tuple[VllmServer, list[Any]]]]:
    """`serving(lines, status)`: a server that answers all requests with these lines."""
    running: list[HTTPServer] = []

    def serve(lines: list[bytes], status: int = 200) -> tuple[VllmServer, list[Any]]:
        asked: list[Any] = []

        class Answers(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(b"\n".join(lines))

            def log_message(self, *_: Any) -> None: ...

        http = HTTPServer((demo_server.HOST, 0), Answers)
        running.append(http)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        server = VllmServer(Path("model"), {}, Path("log"))
        server.port = http.server_port
        return server, asked

    yield serve
    for http in running:
        http.shutdown()
        http.server_close()


def event(**what: Any) -> bytes:
    return b"data: " + json.dumps(what).encode() + b"\n"


def piece(text: str | None) -> bytes:
    return event(choices=[{"delta": {"content": text}}])


USAGE = event(choices=[], usage={"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 8}})


def test_an_answer_is_put_together_from_its_pieces(serving) -> None:
    server, asked = serving([piece(""), piece("It is "), piece(None), piece("blue."), USAGE])
    said: list[str] = []
    reply = server.ask("What?", 24, SKIP_LOAD, said.append)
    assert (reply.content, said) == ("It is blue.", ["It is ", "blue."])
    assert (reply.prompt_tokens, reply.hit_tokens) == (9, 8)
    assert 0 < reply.ttft_s < 60
    assert asked[0]["temperature"] == 0
    assert asked[0]["kv_transfer_params"] == SKIP_LOAD["kv_transfer_params"]


def test_no_details_are_no_hits(serving) -> None:
    usage = event(choices=[], usage={"prompt_tokens": 9, "prompt_tokens_details": None})
    server, _ = serving([piece("a"), usage, b"data: [DONE]", piece("b")])
    reply = server.ask("What?", 24, {}, lambda _: None)
    assert (reply.content, reply.hit_tokens) == ("a", 0)


@pytest.mark.parametrize(
    ("lines", "status", "words"),
    [
        ([b"no such model"], 404, r"refused a request \(404\): no such model"),
        ([piece("a"), event(error={"message": "dead"})], 200, "failed.*dead"),
        ([piece("a")], 200, "ended early"),
        ([], 200, "ended early"),
    ],
)
def test_what_is_no_answer_is_an_error(serving, lines, status, words) -> None:
    server, _ = serving(lines, status)
    with pytest.raises(TierloomError, match=words):
        server.ask("What?", 24, {}, lambda _: None)


def test_nobody_there_is_an_error() -> None:
    with pytest.raises(TierloomError, match="went away"):
        VllmServer(Path("model"), {}, Path("log")).ask("What?", 24, {}, lambda _: None)


def test_a_server_that_does_not_start_is_told(tmp_path: Path) -> None:
    server = VllmServer(Path("model"), {}, tmp_path / "log")
    server._command = [sys.executable, "-c", "raise SystemExit('out of memory')"]
    with pytest.raises(TierloomError, match="status 1 while it started"), server:
        server.wait_ready()
    assert (tmp_path / "log").read_text() == "out of memory\n"


DEAF = "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
ENGINE = DEAF + "print(os.getpid(), flush=True); time.sleep(600)"
SERVER = DEAF + f"subprocess.Popen([sys.executable, '-c', {ENGINE!r}]); time.sleep(600)"


def test_a_server_that_will_not_end_is_ended(tmp_path: Path, monkeypatch) -> None:
    """It, and the engine that it started, neither of which hears."""
    monkeypatch.setattr(demo_server, "STOP_S", 0.5)
    server, log = VllmServer(Path("model"), {}, tmp_path / "log"), tmp_path / "log"
    server._command = [sys.executable, "-c", SERVER]

    def interrupted() -> None:
        with server:
            until = time.monotonic() + 60
            while not log.read_text().strip() and time.monotonic() < until:
                time.sleep(0.05)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert runs(int(log.read_text()), within=10) is False


def runs(pid: int, within: float) -> bool:
    """Whether a process still runs after so many seconds; one that nobody has reaped does not."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state in "ZX":
            return False
        time.sleep(0.05)
    return True


def judged(*given: tuple[Answer, Answer]) -> tuple[dict[str, Any], str, str]:
    pairs = [Pair(*pair) for pair in given]
    verdict = verdict_on(pairs, OnVllm.restarted)
    shown, figures = OnVllm.__new__(OnVllm).figures(pairs, verdict)
    return figures, verdict.wrong, shown


def reply(hit: int = 0, text: str = "a", ttft_s: float = 8.0) -> Answer:
    return Answer(text, ttft_s, 2287, hit)


GOOD = [
    (reply(), reply()),
    (reply(2272, ttft_s=0.2), reply()),
    (reply(2240, ttft_s=0.4), reply()),
    (reply(2272, ttft_s=0.2), reply()),
]


def test_figures_of_a_good_run() -> None:
    figures, wrong, shown = judged(*GOOD)
    assert figures == {
        "cold_ttft_s": 8.0, "repeat_ttft_s": 0.2, "restart_ttft_s": 0.4, "prompt_tokens": 2287,
        "repeat_hit_tokens": 2272, "restart_hit_tokens": 2240, "identical": True,
    }  # fmt: skip
    assert wrong == ""
    assert "(40 times sooner)" in shown
    assert "identical" in shown


@pytest.mark.parametrize(
    ("at", "pair", "identical", "words"),
    [
        (0, (reply(text="b"), reply()), False, "answer 1 "),
        (2, (reply(2240, "b"), reply()), False, "answer 3 "),
        (1, (reply(2272), reply(2272)), False, "nothing is compared"),
        (0, (reply(64), reply()), True, "nothing is compared"),
        (1, (reply(), reply()), True, "not found again"),
        (2, (reply(), reply()), True, "not found again"),
        (3, (reply(), reply()), True, "not found again"),
        (3, (reply(2272, "b"), reply()), False, "answer 4 "),
    ],
)
def test_what_is_wrong_with_a_run(at, pair, identical, words) -> None:
    pairs = [*GOOD]
    pairs[at] = pair
    figures, wrong, shown = judged(*pairs)
    assert (figures["identical"], words in wrong) == (identical, True)
    assert ("Texts identical" in shown) == identical
