"""`tierloom quality --blend`: its prompts, and what is measured on them, with a tiny model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tierloom.adapters.quality.blend_arms import RANDOM, BlendArm, Case, selective_of
from tierloom.adapters.quality.blend_report import measured_blend, run_blend
from tierloom.adapters.quality.blend_sets import JUDGED, KINDS, PASSAGE, Passage, Prompt, prompts
from tierloom.adapters.quality.subject import Subject, subject_of
from tierloom.stages.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

from ..transformers.conftest import spread, tiny_llama


def words(text: str) -> list[int]:
    """About as many ids as a tokenizer gives: three characters each."""
    return [sum(map(ord, text[i : i + 3])) % 299 + 1 for i in range(0, len(text), 3)]


def windows(ids: list[int]) -> set[tuple[int, ...]]:
    """Every 32 tokens in a row."""
    return {tuple(ids[at : at + 32]) for at in range(len(ids) - 31)}


@pytest.fixture(scope="module")
def subject() -> Subject:
    model = spread(tiny_llama(max_position_embeddings=4096))
    return subject_of("tiny", model, lambda text, **_: {"input_ids": words(text)})


@pytest.mark.parametrize("kind", KINDS)
def test_there_are_enough_prompts_and_those_to_choose_on_are_others(kind: Any) -> None:
    judging, choosing = (list(prompts(kind, words, judging=j)) for j in (True, False))
    assert len(judging) >= JUDGED
    assert len(choosing) >= 8
    assert not {p.name for p in judging} & {p.name for p in choosing}
    seen = {words for p in choosing for q in p.pieces for words in windows(q.ids)}
    assert not [p.name for p in judging for q in p.pieces if windows(q.ids) & seen]
    assert [p.ids for p in judging] == [p.ids for p in prompts(kind, words)]


def test_a_question_is_answered_in_its_passages() -> None:
    for prompt in prompts("rag", words):
        assert all(len(p.ids) == PASSAGE for p in prompt.pieces)
        assert len(prompt.pieces) == 5
        assert 0 < prompt.asked < len(prompt.suffix)


@pytest.fixture(scope="module")
def case(subject: Subject) -> Case:
    ids = [words(f"{i} of the pieces, which all are others and go on. " * 4)[:60] for i in range(5)]
    pieces = [Passage(p, ids[0] + ids[-1]) for p in ids[1:4]]
    return Case(subject, selective_of(subject), Prompt("small", ids[0], pieces, ids[4], 8))


def test_computing_everything_costs_nothing(case: Case) -> None:
    whole = case.judge(BlendArm("heads", 60))
    assert whole.kl < 1e-6
    assert whole.share == pytest.approx(180 / 240)
    none = case.judge(BlendArm("none"))
    assert none.kl > 1e-3
    assert none.share == 0
    assert case.judge(BlendArm("none", alone=True)).kl != none.kl


def test_a_share_counts_all_that_is_computed(case: Case) -> None:
    layers = case.subject.shape.layers
    assert case.judge(BlendArm("heads", 10)).share == pytest.approx(30 / 240)
    probe = case.judge(BlendArm("probe", 4, 0.1, 1.0))
    assert probe.share == pytest.approx((12 + 18 + 8) / 240)
    deviation = case.judge(BlendArm("deviation", share=0.1))
    assert deviation.share == pytest.approx((180 + 24 * (layers - 1)) / (240 * layers))
    assert case.judge(BlendArm(RANDOM, share=0.1)).share == pytest.approx(18 / 240)


def test_a_report(subject: Subject) -> None:
    found = measured_blend(subject, "heads", "seq", 2)
    assert {"kl", "kl_peer", "kl_peer_alone", "kl_none", "share", "documents"} <= found.keys()
    assert found["documents"] == len(found["per_document"]) == 2
    assert 0 < found["share"] < found["share_peer"] < 0.3  # one layer of four is checked
    json.dumps(found)


def test_what_is_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="probes"):
        run_blend("smollm2", "probes", "rag", None, None)
    with pytest.raises(ConfigError, match="--set"):
        run_blend("smollm2", "probe", "all", None, None)
