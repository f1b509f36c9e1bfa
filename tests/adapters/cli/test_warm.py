"""A corpus sent to a server: which prompts it gets, and what is said when it refuses."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, strategies as st

from tierloom.adapters.workload.warm import packs, passages_of, run_warm
from tierloom.stages.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Server(ThreadingHTTPServer):
    """Answers as an OpenAI-compatible server does; refuses prompts that are too long for it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.most = 1 << 30
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._say(200, {"data": [{"id": "a-model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.append(self.headers["Authorization"])
        if len(body["prompt"]) > self.server.most:
            self._say(400, {"message": "longer than the model takes"})
            return
        self.server.asked.append(body)
        self._say(200, {"usage": {"prompt_tokens": len(body["prompt"])}})

    def _say(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.shutdown()
    made.server_close()


def corpus(folder: Path, files: int) -> list[Path]:
    """Each file is three paragraphs that say whose they are."""
    paths = [folder / f"{i}.txt" for i in range(files)]
    for i, path in enumerate(paths):
        path.write_text("\n\n".join(f"file {i} part {j} " + "x" * 900 for j in range(3)))
    return paths


def warm(server: Server, files: list[Path], **options: Any) -> int:
    given = {"system": None, "model": "", "prompt": 4000, "passage": 1000, "token_file": None}
    return run_warm(server.url, files, **(given | options))


def test_all_of_a_corpus_several_passages_to_a_prompt(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system, key = tmp_path / "system.md", tmp_path / "key"
    system.write_text("Answer from the passages.\n")
    key.write_text("sesame\n")
    assert warm(server, corpus(tmp_path, 3), system=system, token_file=key) == 0
    prompts = [asked["prompt"] for asked in server.asked]
    assert all(p.startswith("Answer from the passages.\n\nfile") for p in prompts)
    assert all(p.count("part") > 1 for p in prompts)
    for i in range(3):
        assert all(any(f"file {i} part {j}" in p for p in prompts) for j in range(3))
    assert {(a["model"], a["max_tokens"]) for a in server.asked} == {("a-model", 1)}
    assert all(a["kv_transfer_params"] == {"tierloom.blend": False} for a in server.asked)
    assert set(server.keys) == {"Bearer sesame"}
    assert "9 passages of 3 files in 3 prompts" in capsys.readouterr().out


def test_a_prompt_that_is_too_long_is_halved(server: Server, tmp_path: Path) -> None:
    server.most = 2100
    assert warm(server, corpus(tmp_path, 4)) == 0
    said = " ".join(asked["prompt"] for asked in server.asked)
    assert all(f"file {i} part {j}" in said for i in range(4) for j in range(3))


def test_what_is_refused_is_said(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.most = 10
    assert warm(server, corpus(tmp_path, 1)) == 1
    assert "HTTP 400" in capsys.readouterr().err
    binary = tmp_path / "photo"
    binary.write_bytes(b"\xff\xd8\xff")
    empty = tmp_path / "empty"
    empty.write_text("\n\n")
    for files, options, words in (
        ([binary], {}, "photo: not UTF-8"), ([empty], {}, "no text in"),
        (corpus(tmp_path, 1), {"passage": 5000}, "a passage of 5000 characters"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            warm(server, files, **options)
    with pytest.raises(ConfigError, match="http://HOST:PORT"):
        run_warm("h:1", corpus(tmp_path, 1), system=None, model="", prompt=2, passage=1,
                 token_file=None)  # fmt: skip
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        warm(server, corpus(tmp_path, 1))


@given(st.text("ab \n", max_size=400), st.integers(1, 50))
def test_a_text_is_cut_whole(text: str, most: int) -> None:
    found = list(passages_of(text, most))
    assert all(0 < len(p) <= most for p in found)
    assert "".join("".join(found).split()) == "".join(text.split())


@given(st.lists(st.integers(1, 30), max_size=30))
def test_no_passage_goes_alone(sizes: list[int]) -> None:
    passages = [chr(97 + i % 26) * n for i, n in enumerate(sizes)]
    found = list(packs(passages, 40))
    assert all(len(pack) > 1 for pack in found[1:])
    assert len(found) < 2 or len(found[0]) > 1 or sum(map(len, passages[:2])) + 4 > 40
    told = [p for i, pack in enumerate(found) for p in (pack[1:] if i and len(pack) == 2 else pack)]
    assert set(passages) <= {p for pack in found for p in pack}
    assert len(told) <= len(passages)
