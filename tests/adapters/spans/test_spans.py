"""Spans: one tree for each request, with the right parents, at a real receiver."""

from __future__ import annotations

import json
import os
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from processes import missing

ROOT = Path(__file__).resolve().parents[3]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
RUN = Path(__file__).parent / "spans_run.py"


@pytest.mark.slow
@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.campaign)])
def test_a_tree_for_each_request(count: int, tmp_path: Path) -> None:
    if not PYTHON.exists():
        missing("vllm", f"{PYTHON} is not there", "make vllm")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [PYTHON, RUN, str(count)], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=clean | {"PYTHONPATH": str(ROOT / "src")}, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    trees: dict[str, list[Any]] = defaultdict(list)
    for span in told["spans"]:
        trees[span["trace"]].append(span)
    named = {f"{i + 1:032x}": f"{i + 7:016x}" for i in range(count) if i % 10}
    assert len(trees.keys() - named) == 1, "the store is in no trace of anybody's"
    assert named.keys() <= trees.keys()
    for trace, spans in trees.items():
        by_id = {span["id"]: span for span in spans}
        (root,) = (s for s in spans if s["parent"] not in by_id)
        if trace in named:
            assert (root["name"], root["parent"]) == ("tierloom retrieve", named[trace])
            assert sorted(s["name"] for s in spans) == [
                "stage fetch", "stage grow", "stage keys", "stage place", "stage plan",
                "tier hot reads", "tierloom retrieve",
            ]  # fmt: skip
        else:
            assert (root["name"], root["parent"]) == ("tierloom store", "")
            of = {s["name"]: by_id[s["parent"]]["name"] for s in spans if s is not root}
            assert of["tier hot puts"] == "stage hot"
            assert of["tier warm puts"] == "stage warm"
            assert {of[name] for name in of if name.startswith("stage ")} == {"tierloom store"}
        for span in spans:
            assert span["service"] == "tierloom"
            assert span["begin"] <= span["end"]
            if span["name"].startswith("tier "):
                stage = by_id[span["parent"]]
                assert stage["begin"] <= span["begin"] + 1000
                assert span["end"] <= stage["end"] + 1000
    assert told["noted"] == 5 * count, "and pipe.trace() saw the same"
