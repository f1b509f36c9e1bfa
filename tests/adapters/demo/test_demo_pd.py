"""`make demo-pd`: what it asks of whom, what it makes of the answers, and a run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from processes import real_model

from tierloom.adapters.demo import on_pd
from tierloom.adapters.demo.on_pd import OnPd
from tierloom.adapters.demo.run import Demo, Pair, verdict_on
from tierloom.adapters.demo.screen import Answer
from tierloom.stages.errors import TierloomError

ROOT = Path(__file__).resolve().parents[3]
VENV = ROOT / ".venv-vllm"


def reply(hit: int = 0, text: str = "a", ttft_s: float = 8.0) -> Answer:
    return Answer(text, ttft_s, 2287, hit)


def judged(killed: Answer, *kept: Answer) -> tuple[dict[str, Any], str, str]:
    demo, backend = Demo.__new__(Demo), OnPd.__new__(OnPd)
    demo.pairs = [Pair(answer, kept[0]) for answer in kept]
    backend.share = 0.95
    backend.judge(demo, killed, kept[0])
    verdict = verdict_on(demo.pairs, OnPd.restarted)
    shown, figures = backend.figures(demo.pairs, verdict)
    return figures, verdict.wrong, shown


GOOD = [reply(), reply(2272, ttft_s=0.4), reply(2272, ttft_s=0.2), reply(2272, ttft_s=9.0)]


def test_figures_of_a_good_run() -> None:
    figures, wrong, shown = judged(reply(), *GOOD)
    assert figures == {
        "prompt_tokens": 2287, "landed_tokens": 2272, "landed_share_when_prefill_answered": 0.95,
        "cold_ttft_s": 8.0, "own_hit_ttft_s": 0.2, "decoder_ttft_s": 0.4, "identical": True,
        "identical_after_prefiller_killed": True,
    }  # fmt: skip
    assert wrong == ""
    assert "(20 times sooner)" in shown
    assert "95%" in shown
    assert "Texts identical" in shown


def test_another_answer_after_the_kill_is_no_good_run() -> None:
    figures, wrong, _ = judged(reply(text="b"), *GOOD)
    assert (figures["identical"], figures["identical_after_prefiller_killed"]) == (False, False)
    assert "answer 5 " in wrong


def test_what_did_not_land_is_no_good_run() -> None:
    assert "not found again" in judged(reply(), GOOD[0], reply(), *GOOD[2:])[1]
    assert "answer 4 " in judged(reply(), *GOOD[:3], reply(2272, "b"))[1]


def test_a_prefiller_that_hands_nothing_over_is_told() -> None:
    class Plain:
        def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
            assert (path, body["max_tokens"]) == ("/v1/chat/completions", 1)
            assert body["kv_transfer_params"] == on_pd.GIVES | {"transfer_id": "t"}
            assert body["cache_salt"] == "s"
            return {"kv_transfer_params": None}

    with pytest.raises(TierloomError, match="hands nothing over"):
        on_pd.prefill(Plain(), {"cache_salt": "s"}, {"transfer_id": "t"})  # type: ignore[arg-type]


@real_model
@pytest.mark.campaign
@pytest.mark.timeout(900)
def test_the_demo_of_a_prefiller_and_a_decoder(tmp_path: Path) -> None:
    if not (VENV / ".ready").exists():
        pytest.skip("no vLLM: make vllm")
    file = tmp_path / "figures.json"
    command = [str(VENV / "bin" / "python"), "-m", on_pd.__name__, "--json", str(file)]
    done = subprocess.run(command, cwd=tmp_path, check=False, text=True, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stdout
    figures = json.loads(file.read_text())
    print(figures)
    assert figures["identical"]
    assert figures["identical_after_prefiller_killed"]
    assert min(figures["prompt_tokens"], figures["landed_tokens"]) >= 2048
    assert figures["landed_share_when_prefill_answered"] > 0
