"""`tierloom proxy` as it is started."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from stub_engine import completion

COMMAND = [sys.executable, "-m", "tierloom.adapters.cli", "proxy"]


@contextmanager
def started(*words: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    child = subprocess.Popen(
        [*COMMAND, "--port", "0", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = child.stdout.readline()
        yield line.removeprefix("listening on ").strip(), child
    finally:
        child.kill()
        child.communicate(timeout=20)


def test_it_serves_until_it_is_told_to_end(engines) -> None:
    _, (prefill, _, decode, _) = engines
    urls = ["--prefill", f"http://127.0.0.1:{prefill}", "--decode", f"http://127.0.0.1:{decode}/v1"]
    with started(*urls, "--drain", "5 s") as (url, child), httpx.Client(timeout=20) as client:
        body = {"model": "stub", "prompt": "x" * 9000, "max_tokens": 3}
        answer = client.post(f"{url}/v1/completions", json=body)
        assert answer.json() == completion(body)
        body["stream"] = True
        with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            child.send_signal(signal.SIGTERM)
            assert answer.read().endswith(b"data: [DONE]\n\n")
        said = child.communicate(timeout=20)[1]
    assert re.search(r"INFO proxy: request \w+ /v1/completions way=after status=200", said)
    assert "Traceback" not in said


def refused(*words: str) -> str:
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return re.sub(r"[\s│]+", " ", done.stderr)


ONE = ("--decode", "http://x:1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no engine: pass --decode"),
        ((*ONE, "--host", "0.0.0.0"), "name a --token-file, or set TIERLOOM_PROXY_"),
        (("--decode", "x"), "engine 'x': write http://HOST:PORT"),
        ((*ONE, "--decode", "http://x:1/v1"), "is there already"),
        ((*ONE, "--way", "never"), "pass auto, after or together"),
        ((*ONE, "--drain", "5"), "'5' has no unit"),
        ((*ONE, "--host", "192.0.2.1", "--token-file", __file__), "--port 8000:"),
    ],
)
def test_mistakes(words, said) -> None:
    assert said in refused(*words)


def test_nothing_of_it_is_imported_by_other_commands() -> None:
    code = "import tierloom.adapters.cli.commands, sys; print(*sys.modules)"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    wanted = {"starlette", "uvicorn", "tierloom.adapters.proxy.parts", "asyncio"}
    assert not wanted & set(names.stdout.split())
