"""An engine that answers by a formula, over real HTTP."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "proxy"))
from stub_engine import InThread, StubEngine

from tierloom.adapters.cli import commands as cli


class Moody(StubEngine):
    """Answers another text where its cache is asked (`moody`)."""

    moody = False

    async def _stream(self, body: dict[str, Any], half: bool, request: Any) -> Any:
        if self.moody and "cache_salt" not in body:
            body = {**body, "messages": [*body["messages"], {"role": "user", "content": "x"}]}
        async for event in super()._stream(body, half, request):
            yield event


@pytest.fixture(scope="session")
def served() -> Iterator[Moody]:
    engine = Moody()
    with InThread([engine.app]) as threads:
        engine.port = threads.ports[0]
        yield engine


@pytest.fixture
def engine(served: Moody) -> Moody:
    served.__dict__.update(seen=[], aborted=[], faults=[], pace=0.0, moody=False)
    return served


@pytest.fixture
def bench(engine, capsys, monkeypatch, tmp_path) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Exit code, figures and what was said of `tierloom bench engine`, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> tuple[int, dict[str, Any], str]:
        url = f"http://127.0.0.1:{engine.port}/v1"
        command = ["tierloom", "bench", "engine", *words, "--base-url", url, "--json", "-"]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), json.loads(out) if out else {}, err

    return run
