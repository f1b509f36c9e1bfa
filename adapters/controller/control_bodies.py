"""What the controller is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from tierloom.pipeline.admin.admin_bodies import MOST_CHUNKS
from tierloom.stages.errors import InputError

_STRICT = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LookupBody:
    """A prompt, as token ids, as text, or as the keys of its chunks."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    """For models whose tokenizer the controller was given."""
    chunks: list[str] = field(default_factory=list)
    """Keys, in hex digits, from the prompt's first chunk on."""
    model: str = ""
    """Engines of this model alone; `text` needs it."""
    salt: str = ""
    adapter: str = ""
    """Content id of a LoRA adapter."""
    tags: dict[str, str] = field(default_factory=dict)
    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    def __post_init__(self) -> None:
        if sum(map(bool, (self.tokens, self.text, self.chunks))) != 1:
            raise InputError("say one of tokens, text and chunks")
        if self.text and not self.model:
            raise InputError("text needs a model, whose tokenizer is used")
        if len(self.chunks) > MOST_CHUNKS:
            raise InputError(f"{len(self.chunks)} chunks: {MOST_CHUNKS} at most")


@dataclass(frozen=True, slots=True)
class InstanceHit:
    """What an engine has of a prompt: of its first tokens, in all shares of the model."""

    tokens: int
    bytes: int
    """KV of these tokens, before it was encoded."""
    tiers: dict[str, int]
    """Of these tokens, how many lie in each tier."""
    workers: int


@dataclass(frozen=True, slots=True)
class LookupAnswer:
    """Who has how much of a prompt."""

    tokens: int
    """Of the prompt; 0: it was asked for by chunks."""
    instances: dict[str, InstanceHit]
    """Those that have any of it."""


@dataclass(frozen=True, slots=True)
class InstanceSummary:
    """An engine that lives."""

    model: str
    workers: int
    tiers: list[str]
    addresses: list[str]
    """Where its tiers are read."""
    door: str
    """Where it takes orders; empty: nowhere."""
    chunk: int
    grain: int


@dataclass(frozen=True, slots=True)
class FleetHealth:
    """Whether the directory answers, and what each engine's door says of itself."""

    status: str
    """ready, or unready where the directory does not answer."""
    instances: dict[str, str]
    """ready, degraded, unready, silent; alive: it has no door."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a lookup found what it did."""

    found: dict[str, int]
    """Tokens by engine."""
    reasons: dict[str, list[str]]
    """By engine, and of none in particular."""


Workers = dict[str, dict[str, Any]]
"""Records by the worker's name."""
