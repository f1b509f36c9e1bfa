"""The demo's questions, and how one is asked and timed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from tierloom.adapters.demo.smollm2 import NAME
from tierloom.adapters.transformers.cached_model import Kept, Watch
from tierloom.pipeline.config.load import load
from tierloom.stages.errors import InputError

QUESTIONS = (
    "When did the Slow Survey begin?",
    "Which town is nearest to the observatory?",
    "How wide is the mirror of the Brannock Reflector?",
)
NEW_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, greedy."""

    ids: list[int]
    """The new tokens."""
    ttft_s: float
    """From the call to the first new token, lookup and load included."""
    prompt_tokens: int
    hit_tokens: int


def asked(question: str) -> str:
    """What the user says: the document, and then the question."""
    document = (resources.files("tierloom") / "configs" / "demo.txt").read_text("utf-8").strip()
    return f"{document}\n\nAnswer from the text above. {question}"


def prompt(tokenizer: Any, question: str) -> torch.Tensor:
    """The document and a question as `[1, tokens]` int64."""
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked(question)}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    ids: torch.Tensor = encoded["input_ids"]
    return ids


def ask(model: Any, ids: torch.Tensor, streamer: Any = None) -> Answer:
    """Answer without tierloom."""
    watch = Watch(streamer)
    started = time.perf_counter()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), streamer=watch,
        max_new_tokens=NEW_TOKENS, do_sample=False,
    )  # fmt: skip
    return _answer(ids, out, watch.first - started, 0)


def ask_kept(kept: Kept, ids: torch.Tensor, streamer: Any = None) -> Answer:
    """Answer through tierloom; waits afterwards until what it stores is kept."""
    out = kept.generate(ids, streamer=streamer, max_new_tokens=NEW_TOKENS, do_sample=False)
    kept.flush()
    return _answer(ids, out, kept.last.ttft_s, kept.last.hit_tokens)


def warm_up(model: Any) -> None:
    """Let torch make its threads and primitives, so that the first figure is not theirs."""
    ask(model, torch.arange(100, 356).unsqueeze(0))


def disks(config: str, folder: Path) -> Mapping[str, str]:
    """Overrides that put every disk tier of `config` into `folder`.

    Raises ConfigError, and InputError when there is no disk tier.
    """
    names = [name for name, tier in load(config).tiers.items() if tier.use == "disk"]
    if not names:
        raise InputError(f"{config} keeps nothing on disk, so nothing would survive the restart")
    return {f"tiers.{name}.path": str(folder / name) for name in names}


def remember(model: Any, config: str, overrides: Mapping[str, str]) -> Kept:
    """`model` with a pipeline of its own."""
    return Kept(model, config=config, name=NAME, overrides=overrides)


def _answer(ids: torch.Tensor, out: torch.Tensor, ttft_s: float, hit: int) -> Answer:
    new = out[0, ids.shape[1] :].tolist()
    return Answer(new, ttft_s, int(ids.shape[1]), hit)
