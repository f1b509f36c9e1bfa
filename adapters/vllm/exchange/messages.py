"""Messages between the scheduler's side and the workers' side of the connector, step by step.

vLLM carries these between processes: plain data only, small, and None if there is nothing to send.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from tierloom.adapters.vllm.exchange.handoff_params import Elsewhere
from tierloom.pipeline.handoff.handoff import ToldDecoder
from tierloom.stages.kv.block_table import BlockTable
from tierloom.stages.kv.chain_seed import Keys
from tierloom.stages.kv.namespace import Namespace
from tierloom.stages.kv.prefix import Span
from tierloom.stages.kv.text import Run, Text
from tierloom.stages.tiers.server.ranks import RankShare

Blocks = tuple[BlockTable, ...]
"""For each KV group, the blocks that hold a span."""

Stretches = list[tuple[int, int]]
"""(First token of a prompt, last + 1), in rising order."""


class Passages(NamedTuple):
    """What a load brings besides its span: text that was captured elsewhere. The load ends when
    what must be computed between and in it is computed; see `Order`."""

    ids: bytes
    """Token ids of the prompt as int32, up to where the load ends."""
    runs: tuple[Run, ...]
    blocks: list[int]
    """vLLM's blocks from the prompt's first token on."""
    waits: bool
    """Nothing is placed before an order says so: proofs come first, in these blocks."""


class Load(NamedTuple):
    """Load part of a prompt into blocks that vLLM has allocated for it."""

    request: str
    span: Span
    blocks: Blocks
    start: int
    """Tokens of the prompt before the span."""
    fresh: int
    """Tokens of the prompt before the ones to load: they are in the engine's own cache."""
    total: int
    """Tokens of the prompt."""
    seconds: float
    """How long it may take."""
    layered: bool
    """It runs within the step, ahead of the model; otherwise between steps."""
    passages: Passages | None = None
    trace: str = ""
    """By which it belongs to somebody's trace: a `traceparent` as W3C writes it."""

    def traced(self, request: Any) -> Load:
        """In the trace of vLLM's request, if that is in one."""
        return self._replace(trace=traceparent(request))


class Order(NamedTuple):
    """What all workers do for a request with passages in one step: their ranks compute in step."""

    request: str
    what: Literal["prove", "place", "compute", "probe", "end", "fail"]
    """`prove` the model in its blocks; `place` what is loaded; `compute` stretches; compute one and
    `probe` what it attends to; `end` the load; `fail` it, so that vLLM computes all."""
    stretches: Sequence[tuple[int, int]] = ()


class Promised(NamedTuple):
    """Chunks that another engine is to fetch."""

    ticket: bytes
    chunks: list[bytes]
    """Grain links of each."""
    receiver: ToldDecoder | None = None
    """That engine, where the proxy has named it."""


class Answered(NamedTuple):
    """A request has ended for which a proxy has named a decoder, and waits."""

    ticket: bytes
    """Empty: nothing was promised."""
    receiver: ToldDecoder


class Fetch(NamedTuple):
    """Fetch the chunks of a request from the engine that computes it, into memory."""

    request: str
    chunks: list[bytes]
    """Grain links of each."""
    landed: Elsewhere
    """NOWHERE: fetch nothing, but say what is here."""


class Save(NamedTuple):
    """Save part of a prompt, which this step completes."""

    job: int
    request: str
    span: Span
    blocks: Blocks
    epoch: int = 0
    """Cache resets before it was planned."""
    ids: bytes = b""
    """Token ids of the span as int32, where text is kept by content."""
    exact: int = 1 << 62
    """Tokens of the span before the first that was computed over text captured elsewhere."""
    trace: str = ""
    """As of a load."""


def traceparent(request: Any) -> str:
    """Of a request of vLLM's; empty: it is in no trace."""
    return str((getattr(request, "trace_headers", None) or {}).get("traceparent", ""))


@dataclass(slots=True)
class Plan(KVConnectorMetadata):
    """The scheduler to every worker, each step."""

    idle: bool = False
    """The step computes nothing."""
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    questions: dict[str, Span] = field(default_factory=dict)
    """Prompts of which tiers without an index here are asked how much they have."""
    fenced: list[int] = field(default_factory=list)
    """Jobs whose blocks this step may overwrite."""
    held: list[str] = field(default_factory=list)
    """Finished requests whose blocks are kept until their jobs have read them."""
    abandoned: list[str] = field(default_factory=list)
    """Requests that were canceled while they were loaded."""
    orders: list[Order] = field(default_factory=list)
    ranks: tuple[RankShare, ...] = ()
    """What each worker gives other engines to read, once it is known; empty: nothing new."""
    promised: list[Promised] = field(default_factory=list)
    settled: list[bytes] = field(default_factory=list)
    """Tickets of which nothing more will be stored."""
    released: list[bytes] = field(default_factory=list)
    """Tickets whose chunks nobody will fetch."""
    answered: list[Answered] = field(default_factory=list)
    fetches: list[Fetch] = field(default_factory=list)
    unwanted: list[str] = field(default_factory=list)
    """Requests that ended while their chunks were fetched."""


class WorkerInfo(NamedTuple):
    """What a worker's pipelines are; sent once."""

    namespace: Namespace
    """Seeds the chain of keys that all workers have in common."""
    keys: Keys
    """How it does."""
    grain: int
    chunk: int
    unit: int
    """Saves end at multiples of this number of tokens."""
    groups: int
    """Pipelines of this worker: one for each KV group."""
    tiers: tuple[str, ...]
    """Tiers that have an index here, best first."""
    remote: str
    """Its best tier without an index here; empty: all have one."""
    uses: dict[str, str]
    """Tier to what kind it is."""
    worth: str
    deadline: float
    """Seconds that a load of any size may take."""
    token_bytes: int
    """KV bytes of a token in this worker."""
    off: str
    """Why caching is off; empty: it is on."""
    by_content: bool = False
    """Text is kept with its token ids, and found anywhere."""
    exactly: str = "blending is off"
    """Why no prompt is blended; empty: some may be."""
    serves: tuple[RankShare, ...] = ()
    """What this worker gives other engines to read, and where; of all workers, in order; empty:
    one of them gives nothing."""

    @staticmethod
    def of_all(infos: dict[int, WorkerInfo]) -> WorkerInfo:
        """What all workers have in common; `off` if they differ."""
        first = infos[0]
        for other in infos.values():
            own = other._replace(token_bytes=0, serves=())
            if own != first._replace(token_bytes=0, serves=()):
                off = f"the workers disagree about what is kept: {first}, {other}"
                return first._replace(off=off)
        serves = [share for _, info in sorted(infos.items()) for share in info.serves]
        return first._replace(
            token_bytes=max(h.token_bytes for h in infos.values()),
            serves=tuple(serves) if all(h.serves for h in infos.values()) else (),
        )


class CacheEvent(NamedTuple):
    """An object came to a local tier of a KV group, or left it."""

    group: int
    tier: str
    kept: bool
    links: bytes
    text: Text | None = None
    """Of one that came, by the first worker, where its header has it."""


class Placed(NamedTuple):
    """A request's passages lie in their blocks, or were lost."""

    compute: Stretches
    """What this worker wants computed, by its policy."""
    absent: Stretches
    """What of it nothing was loaded for."""
    probe: bool
    """The policy wants to know what the prompt's last tokens attend to."""


@dataclass(slots=True)
class WorkerReport:
    """What one worker has to tell after a step."""

    info: WorkerInfo | None = None
    events: list[CacheEvent] = field(default_factory=list)
    more: bool = False
    """More events follow in the next reports that have any."""
    captured: list[int] = field(default_factory=list)
    """Jobs that have read their blocks."""
    ended: list[int] = field(default_factory=list)
    """Jobs that have ended, stored or not."""
    answers: dict[str, int] = field(default_factory=dict)
    """Tokens stored of the prompts that were asked about."""
    loaded: list[str] = field(default_factory=list)
    """Requests whose load ran within this step and has ended."""
    failed: list[str] = field(default_factory=list)
    """Requests that got less than was planned."""
    costs: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Tier to (seconds before the first byte, seconds per byte)."""
    placed: dict[str, Placed] = field(default_factory=dict)
    proved: str | None = None
    """Why the model must not be called for repairs; empty: it may be; None: not tried now."""
    broken: dict[str, str] = field(default_factory=dict)
    """Requests whose repair went wrong, and how."""
    landed: list[str] = field(default_factory=list)
    """Requests of which all has come that will, and is among the events so far."""

    def __bool__(self) -> bool:
        lists = (
            self.events, self.captured, self.ended, self.loaded, self.failed, self.landed,
        )  # fmt: skip
        maps = (self.answers, self.costs, self.placed, self.broken)
        return self.info is not None or self.proved is not None or any(lists) or any(maps)

    def then(self, later: WorkerReport) -> WorkerReport:
        """Both as one, in order; if both name the same thing, the later counts."""
        return WorkerReport(
            info=later.info or self.info, events=self.events + later.events, more=later.more,
            captured=self.captured + later.captured, ended=self.ended + later.ended,
            answers=self.answers | later.answers, loaded=self.loaded + later.loaded,
            failed=self.failed + later.failed, costs=self.costs | later.costs,
            placed=self.placed | later.placed, broken=self.broken | later.broken,
            proved=self.proved if later.proved is None else later.proved,
            landed=self.landed + later.landed,
        )  # fmt: skip


@dataclass(slots=True)
class WorkerReports(KVConnectorWorkerMetadata):
    """The workers to the scheduler."""

    by_worker: dict[int, WorkerReport]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReports:
        """Of all workers. One may come twice: vLLM may deliver a step's report late."""
        assert isinstance(other, WorkerReports)
        merged = dict(self.by_worker)
        for worker, report in other.by_worker.items():
            before = merged.get(worker)
            merged[worker] = before.then(report) if before is not None else report
        return WorkerReports(merged)
