"""vLLM's own scheduler and both sides of the connector around a model that is a formula.

A slice of what `make test-vllm` runs whole: every order of hooks, and engines of any sizes.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import launch
import pytest

RUN = Path(__file__).with_name("sim_run.py")
PD_RUN, KILLS = RUN.with_name("pd_run.py"), RUN.with_name("pd_kills.py")
NEXT = "0.33.0"


def played(
    model: Path, *arguments: Any, release: Path | None = None, seconds: float = 580
) -> dict[str, Any]:
    """`release`: another vLLM's Python files, instead of the one that is installed."""
    path = {"PYTHONPATH": f"{release}:{launch.ROOT / 'src'}"} if release else {}
    run = launch.finish(RUN, str(model), *map(str, arguments), timeout=seconds, **path)
    said = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert len(said) == 1
    result: dict[str, Any] = json.loads(said[0].removeprefix("RESULT "))
    print(result)
    assert (result["wrong"], result["read_late"]) == ([], 0)
    assert result["hit_tokens"] > 10 * result["engines"]
    return result


def test_no_order_of_hooks_reads_a_block_that_is_somebody_elses(llama: Path) -> None:
    """Saves by layer and by step, finished, given up, preempted and continued requests, drafts
    that are refused; blocks are overwritten as soon as nobody holds them."""
    played(llama, "orders", 1, 23)


def test_any_block_size_with_any_chunk_size(llama: Path) -> None:
    played(llama, "positions", 12, 7)


def test_sessions_that_get_their_input_piece_by_piece(llama: Path) -> None:
    """What was sampled last is dropped when more comes; and the engine sleeps once."""
    played(llama, "sessions", 90)


def handed_over(model: Path, rounds: int, seed: int = 0, seconds: float = 580) -> dict[str, Any]:
    run = launch.finish(PD_RUN, str(model), str(rounds), str(seed), timeout=seconds)
    said = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    result: dict[str, Any] = json.loads(said[0].removeprefix("RESULT "))
    print(result)
    assert (result["wrong"], result["read_late"], result["rounds"]) == ([], 0, rounds)
    assert result["load_tokens"] > 50 * rounds
    return result


def test_no_hand_off_brings_what_is_not_the_prompts(llama: Path) -> None:
    """A prefiller and a decoder of other block sizes, tickets that are replayed and swapped,
    parameters that make no sense, requests that are given up."""
    handed_over(llama, 80)


@pytest.mark.campaign
@pytest.mark.timeout(20_000)
def test_many_prompts_at_once_where_there_is_room_for_few_of_them(llama: Path) -> None:
    run = launch.finish(PD_RUN, str(llama), "1000", "1", "crowd", timeout=20_000)
    said = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    result = json.loads(said[0].removeprefix("RESULT "))
    print(result)
    assert (result["wrong"], result["rounds"]) == ([], 1000)
    assert result["landed"] > 20 * 1000, "what fits does land"
    assert result["given_up"] > 20 * 1000, "and there was no room for most"


@pytest.mark.campaign
@pytest.mark.timeout(20_000)
def test_prefillers_that_are_killed_leave_nothing(llama: Path) -> None:
    run = launch.finish(KILLS, str(llama), "200", "1", timeout=20_000)
    said = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    result = json.loads(said[0].removeprefix("RESULT "))
    print(result)
    assert (result["wrong"], result["kills"]) == ([], 200)
    assert result["landed"]


@pytest.mark.campaign
@pytest.mark.timeout(20_000)
def test_ten_thousand_hand_offs(llama: Path) -> None:
    handed_over(llama, 10_000, 1, seconds=20_000)


@pytest.mark.campaign
@pytest.mark.timeout(20_000)
@pytest.mark.parametrize("what", [("orders", 1, 1), ("positions", 1250, 0), ("sessions", 1)])
def test_all_of_it(llama: Path, what: tuple[Any, ...]) -> None:
    played(llama, *what, seconds=20_000)


@pytest.mark.campaign
@pytest.mark.timeout(20_000)
@pytest.mark.parametrize("what", [("orders", 1, 1), ("positions", 100, 3), ("sessions", 4)])
def test_the_next_release_of_vllm(llama: Path, what: tuple[Any, ...]) -> None:
    """Its scheduler, its orders of hooks, its sessions."""
    release = launch.VENV / f"vllm-{NEXT}"
    subprocess.run([launch.PYTHON, RUN.with_name("next_release.py"), NEXT, release], check=True)
    assert played(llama, *what, release=release, seconds=20_000)["vllm"].startswith(NEXT)
