"""What the scheduler's side and the workers' side of the connector tell each other, step by step.

vLLM carries these between processes; plain data only, small, and None where there is nothing to
say.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from tierloom.stages.kv.block_table import BlockTable
from tierloom.stages.kv.namespace import Namespace
from tierloom.stages.kv.prefix import Span

Blocks = tuple[BlockTable, ...]
"""For each KV group, the blocks that hold a span."""


class Load(NamedTuple):
    """Bring part of a prompt into blocks that vLLM has set aside for it."""

    request: str
    span: Span
    blocks: Blocks
    start: int
    """Tokens of the prompt before the span."""
    fresh: int
    """Tokens of the prompt before what is loaded: in the engine's own cache already."""
    total: int
    """Tokens of the prompt."""
    seconds: float
    """How long it may take."""
    layered: bool
    """It runs within the step, ahead of the model; otherwise between steps."""


class Save(NamedTuple):
    """Keep part of a prompt, which this step completes."""

    job: int
    request: str
    span: Span
    blocks: Blocks
    epoch: int = 0
    """Resets of what is kept before it was planned."""


@dataclass(slots=True)
class Plan(KVConnectorMetadata):
    """The scheduler to every worker, each step."""

    idle: bool = False
    """The step computes nothing."""
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    questions: dict[str, Span] = field(default_factory=dict)
    """How much of these prompts do the tiers keep that have no index here?"""
    fenced: list[int] = field(default_factory=list)
    """Jobs whose blocks this step may overwrite."""
    held: list[str] = field(default_factory=list)
    """Finished requests whose blocks are kept until their jobs have read them."""
    abandoned: list[str] = field(default_factory=list)
    """Requests that were given up while they were loaded."""


class Hello(NamedTuple):
    """What a worker's pipelines are; said once."""

    whole: Namespace
    """Seeds the chain of keys that all workers have in common."""
    grain: int
    chunk: int
    unit: int
    """Saves end at multiples of so many tokens: 1 where any number can be kept."""
    shares: int
    """Pipelines of this worker: one for each KV group."""
    tiers: tuple[str, ...]
    """Tiers that have an index here, best first."""
    remote: str
    """Its best tier that has none; empty: all have."""
    uses: dict[str, str]
    """Tier to what kind it is."""
    worth: str
    deadline: float
    """Seconds that a load may take whatever its size."""
    token_bytes: int
    """KV bytes of a token, in this worker."""
    off: str
    """Why nothing can be kept; empty: all is well."""

    @staticmethod
    def of_all(hellos: dict[int, Hello]) -> Hello:
        """What all workers are; `off` where they are not alike."""
        first = hellos[0]
        for other in hellos.values():
            if other._replace(token_bytes=0) != first._replace(token_bytes=0):
                off = f"the workers disagree about what is kept: {first}, {other}"
                return first._replace(off=off)
        return first._replace(token_bytes=max(h.token_bytes for h in hellos.values()))


class Seen(NamedTuple):
    """An object came to a local tier of a share, or went."""

    share: int
    tier: str
    kept: bool
    links: bytes


@dataclass(slots=True)
class Told:
    """One worker's news."""

    hello: Hello | None = None
    seen: list[Seen] = field(default_factory=list)
    more: bool = False
    """There is more to see, which follows with the next steps that have something to see."""
    captured: list[int] = field(default_factory=list)
    """Jobs that need their blocks no more."""
    ended: list[int] = field(default_factory=list)
    """Jobs that are through, kept or not."""
    answers: dict[str, int] = field(default_factory=dict)
    """Tokens kept of the prompts that were asked about."""
    loaded: list[str] = field(default_factory=list)
    """Requests whose load ran within this step, and is through."""
    failed: list[str] = field(default_factory=list)
    """Requests that got less than was planned."""
    costs: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Tier to (seconds before the first byte, seconds per byte)."""

    def __bool__(self) -> bool:
        lists = (self.seen, self.captured, self.ended, self.loaded, self.failed)
        return self.hello is not None or any(lists) or bool(self.answers or self.costs)

    def then(self, later: Told) -> Told:
        """Both as one, in order; where each says something of one thing, the later counts."""
        return Told(
            hello=later.hello or self.hello, seen=self.seen + later.seen, more=later.more,
            captured=self.captured + later.captured, ended=self.ended + later.ended,
            answers=self.answers | later.answers, loaded=self.loaded + later.loaded,
            failed=self.failed + later.failed, costs=self.costs | later.costs,
        )  # fmt: skip


@dataclass(slots=True)
class News(KVConnectorWorkerMetadata):
    """The workers to the scheduler."""

    told: dict[int, Told]
    """By worker."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> News:
        """Of all workers. One may come twice, where vLLM brings late what a step left behind."""
        assert isinstance(other, News)
        told = dict(self.told)
        for worker, news in other.told.items():
            told[worker] = told[worker].then(news) if worker in told else news
        return News(told)
