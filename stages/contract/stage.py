"""What a stage is: a step of a graph, built from options and a context.

A stage MUST NOT know its neighbors, start tasks, or write into what it was given (forks share it).
It marks a chunk lost where only that chunk is bad; an exception means that the stage itself is
broken. What it takes (leases above all) it hands to `batch.defer`, which releases it whatever
happens.

A method written `async def` runs on the one loop thread and never holds the GIL for more than
100 us. A plain `def` runs in a thread of the pool: a blocking call that frees the GIL.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from tierloom.stages.contract.batch import Batch
from tierloom.stages.contract.chunks import Chunk
from tierloom.stages.contract.request import Request
from tierloom.stages.kv.chain_seed import Keys
from tierloom.stages.kv.geometry import Geometry
from tierloom.stages.kv.namespace import Namespace
from tierloom.stages.kv.object import Object
from tierloom.stages.kv.rope import Rotation
from tierloom.stages.memory.arena import Arena
from tierloom.stages.memory.device_queue import Mark
from tierloom.stages.tiers.contract.circuit_breaker import CircuitBreaker

if TYPE_CHECKING:
    from tierloom.stages.directory.text_index import TextIndex


class PortType(NamedTuple):
    """What travels on a wire: `kind@place/unit`. Two fit when each word is equal or `any`."""

    kind: str
    """tokens, keys, plan, kv (plain), bytes (perhaps encoded), receipt."""
    place: str
    """host or device."""
    unit: str
    """request or frame."""

    @classmethod
    def parse(cls, text: str) -> PortType:
        if text == "same":
            return cls("same", "same", "same")
        kind, _, rest = text.partition("@")
        place, _, unit = rest.partition("/")
        return cls(kind, place, unit)

    def clashes(self, wanted: PortType) -> tuple[str, ...]:
        """The words in which this does not fit `wanted`."""
        words = zip(self._fields, self, wanted, strict=True)
        return tuple(word for word, a, b in words if a != b and "any" not in (a, b))

    def after(self, comes: PortType) -> PortType:
        """This output with each word `same` replaced by that of the input."""
        return PortType(*(b if a == "same" else a for a, b in zip(self, comes, strict=True)))

    @property
    def is_plan(self) -> bool:
        """A `RequestStage` gives it: more is to be known of the whole request, before batches."""
        return self.unit == "request" and self.kind != "receipt"

    def __str__(self) -> str:
        return f"{self.kind}@{self.place}/{self.unit}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkOptions:
    """How prompts are cut."""

    tokens: int = 256
    """Tokens of a chunk: the unit of storage."""
    grain: int = 32
    """Tokens of a grain: the unit of a hit; divides `tokens`."""
    group: int = 4
    """Layers of a frame: the unit of pipelining."""
    partial: bool = True
    """Keep a prompt's last chunk even when it is not full."""
    keys: Keys = "own"
    """`own`: keys that name model and tenant as well; `sglang`: SGLang's page hashes, to share with
    it (`grain` must be its page size)."""

    def __post_init__(self) -> None:
        if min(self.tokens, self.grain, self.group) < 1:
            raise ValueError("tokens, grain and group must be at least 1")
        if self.tokens % self.grain:
            raise ValueError(f"grain {self.grain} does not divide tokens {self.tokens}")


class ModelFacts(NamedTuple):
    """What an engine knows of the whole model, of which a pipeline may keep a share. No part of any
    name: it says how KV is best coded, not whose it is."""

    layers: int = 0
    """0: not known."""
    files: str = ""
    """Content id of its weight files, whatever dtype they are loaded in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What a stage may know: the pipeline it serves, nothing of the graph that it is in."""

    graph: str
    chunk: ChunkOptions
    geometry: Geometry
    device: str
    """`cpu`, or `cuda:3`: where the engine's cache lives."""
    namespace: bytes
    """Digest that every object of this pipeline carries."""
    names: Namespace
    """What `namespace` is the digest of: model, RoPE, which layers and heads of it."""
    facts: ModelFacts
    replica: bool
    """Another process stores the same KV: this one leaves tiers that both can read to it."""
    trusted: frozenset[str]
    """Tiers whose frames need no check: none, unless `verify: remote` trusts the arena."""
    arena: Arena
    tiers: Mapping[str, CircuitBreaker]
    pool: Callable[..., Awaitable[Any]]
    """Runs a blocking call; see TierContext.pool."""
    rotation: Rotation | None = None
    """How the model turns K; None: not known, so nothing can be placed elsewhere."""
    arriving: Callable[[Object, range], None] | None = None
    """Store: told of frames that lie in an object which is to be kept in memory, before all do."""
    texts: TextIndex | None = None
    """Finds kept text anywhere; None: no stage `reads_texts`."""


class UnderWay(NamedTuple):
    """A batch's copy between the engine's memory and ours, which a device makes."""

    marks: Sequence[Mark]
    settle: Callable[[], None]
    """Does the rest, in a thread, once all marks are passed."""


class Stage(ABC):
    """What both kinds have in common: subclass `RequestStage` or `BatchStage`, say what goes in and
    out, and register the name in `catalog.py`."""

    Options: ClassVar[type[Any]]
    """The frozen dataclass of this stage's options."""
    takes: ClassVar[str]
    """Port type of the input, e.g. `kv@device/frame`."""
    gives: ClassVar[str]
    """Port type of the output; `same` passes the input's kind, place and unit on."""
    tier_options: ClassVar[tuple[str, ...]] = ()
    """Options that name tiers, so that the checker can look them up. A list says where to read
    (None: everywhere), one name where to keep."""
    arena_options: ClassVar[tuple[str, ...]] = ()
    """Those of `tier_options` that must name a tier which keeps its objects in the arena."""
    touches_engine: ClassVar[bool] = False
    """Reads or writes the engine's cache: after it, a batch's gates open."""
    canonical: ClassVar[bool] = False
    """Works on tokens, heads and channels, so KV must be kept in canonical order."""
    secret: ClassVar[bool] = False
    """Only who has a key can read what it makes: nothing of the prompt may lie beside it."""
    leases: ClassVar[int] = 0
    """Objects' worth of arena that a chunk needs while it passes here; reserved beforehand."""

    @classmethod
    def reads_texts(cls, options: Any) -> bool:
        """With these options it needs `Context.texts`."""
        return False

    def __init__(self, options: Any, ctx: Context) -> None:
        self.options, self.ctx = options, ctx

    def is_quick(self, item: Any) -> bool:
        """Of a stage that works in threads: this request, or batch, takes less time than asking
        one, so the loop does it. Not where the engine's memory is touched."""
        return False

    @classmethod
    @abstractmethod
    def work(cls) -> Callable[..., Any]:
        """The method that does the stage's work."""


class RequestStage(Stage):
    """Works on a whole request: names its chunks, or plans what is done with them."""

    @classmethod
    def work(cls) -> Callable[..., Any]:
        return cls.plan

    @abstractmethod
    def plan(self, request: Request) -> Awaitable[None] | None:
        """Set `request.chunks`."""

    def peek(self, request: Request) -> None:
        """`plan` by what this process knows alone: any thread, no I/O, nothing changed. To be
        written where `plan` is a coroutine."""
        assert not runs_on_loop(self.plan), f"{type(self).__name__} has no peek"
        self.plan(request)


class BatchStage(Stage):
    """Works on one batch after another, several at once."""

    @classmethod
    def work(cls) -> Callable[..., Any]:
        return cls.apply

    async def prepare(self, batch: Batch) -> None:
        """On the loop, before `apply`: take the leases that it will need."""

    @abstractmethod
    def apply(self, batch: Batch) -> Awaitable[None] | UnderWay | None:
        """Change the batch's chunks in place. `UnderWay`: a device does it, and the stage's work is
        over when that is settled."""

    async def finish(self, chunks: list[Chunk]) -> None:
        """On the loop, once, after the last branch and wave of these chunks has left the graph and
        before their leases are released."""


def runs_on_loop(method: Callable[..., Any]) -> bool:
    """Whether the loop runs a stage's method; else a thread of the pool does."""
    return iscoroutinefunction(method)
