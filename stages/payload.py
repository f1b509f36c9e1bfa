"""What travels through a graph: a ticket is one request, a batch some of its chunks.

Failure is data here: a piece that is lost rides on with the rest and is reported at the end, so that
leases go home and gates open by the same road, whatever happened.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import numpy as np

from .object import LINK, Object

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import numpy.typing as npt

    from ..triton_kernels.planes import PlaneTable
    from .errors import Lost


class Receipt(NamedTuple):
    """What became of a request."""

    tokens: int
    """Retrieve: length of the prefix that is in place for every layer. Store: tokens now kept."""
    nbytes: int
    """KV bytes that were placed, or newly kept (counted once, however many tiers keep them)."""
    lost: dict[Lost, int]
    """Chunks that were lost on the way, by cause; a chunk refused by one of two tiers counts."""
    tiers: dict[str, int]
    """Chunks that each tier delivered, or took."""
    seconds: float
    """From the call to the end of the last piece."""


@dataclass(slots=True)
class Piece:
    """One chunk of a request on its way."""

    index: int
    """Which chunk of the prompt."""
    start: int
    """Its first token."""
    tokens: int
    links: bytes
    """Its grain links; the last is its key."""
    parent: bytes
    """The link before its first token."""
    take: int = 0
    """Retrieve: tokens of it that will be placed, from its start."""
    source: bytes = b""
    """Retrieve: key of the object that serves it; not its own when only its first grains match."""
    tiers: list[str] = field(default_factory=list)
    """Retrieve: tiers that have it, best first. Store: tiers that lack it."""
    object: Object | None = None
    """As stored. Its lease belongs to the batch's scope."""
    plain: Object | None = None
    """Decoded, where `object` is encoded; its frames are verified already."""
    checksums: npt.NDArray[np.uint64] | None = None
    done: npt.NDArray[np.uint8] | None = None
    """Per frame: gathered, or placed."""
    encoded: dict[Any, Encoded] = field(default_factory=dict)
    """Store: what each encoding stage made of it, by stage."""
    put: set[str] = field(default_factory=set)
    """Store: tiers that it was offered to."""
    took: set[str] = field(default_factory=set)
    """Store: tiers that keep it. Retrieve: the tier that delivered it."""
    nbytes: int = 0
    """KV bytes gathered, or placed."""
    lost: Lost | None = None

    @property
    def key(self) -> bytes:
        return self.links[-LINK:]


@dataclass(slots=True)
class Encoded:
    """A chunk's frames as an encoder left them, until all are there and become one object."""

    frames: list[EncodedFrame | None]
    object: Object | None = None
    lock: anyio.Lock = field(default_factory=anyio.Lock)
    """Held while the object is put together, when two tiers want it at once."""

    @property
    def whole(self) -> bool:
        return all(f is not None for f in self.frames)


class EncodedFrame(NamedTuple):
    """One frame's bytes, still where the encoder put them."""

    data: bytes | memoryview
    raw: int
    codecs: bytes


class Scope:
    """What a batch of chunks holds while any of its branches or waves is still under way."""

    __slots__ = ("_deferred", "open", "pieces")

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self.open = 0
        self._deferred: list[Callable[[], Awaitable[None] | None]] = []

    def defer(self, give_back: Callable[[], Awaitable[None] | None]) -> None:
        """Run this, last first, when the last branch has ended."""
        self._deferred.append(give_back)

    def pop(self) -> Callable[[], Awaitable[None] | None] | None:
        return self._deferred.pop() if self._deferred else None


@dataclass(slots=True)
class Batch:
    """Chunks of one ticket that go together, and which frames of them."""

    ticket: Ticket
    scope: Scope
    frames: range
    forked: bool = False
    """On a branch: what is lost here is lost to this branch only."""
    lost: set[int] = field(default_factory=set)
    """Indices of pieces lost to this branch."""
    encoder: object | None = None
    """The stage whose encoding this branch carries; None: the plain object."""
    passed: bool = False
    """Beyond the stage that touches the engine's memory."""

    @property
    def live(self) -> list[Piece]:
        return [p for p in self.scope.pieces if p.lost is None and p.index not in self.lost]

    def lose(self, piece: Piece, code: Lost) -> None:
        self.ticket.tally(code)
        if self.forked:
            self.lost.add(piece.index)
        else:
            piece.lost = code

    def fork(self) -> Batch:
        """The same chunks for one of several readers."""
        return replace(self, forked=True, lost=set(self.lost))

    def defer(self, give_back: Callable[[], Awaitable[None] | None]) -> None:
        self.scope.defer(give_back)


class Ticket:
    """One request's passage. Made by the caller's thread, worked on by the portal's.

    It holds the caller's tensors until it is done. After `wait()` has returned, nothing reads or
    writes them any more: a copy that is under way is stopped between two frames and waited for.
    """

    def __init__(
        self, graph: str, tokens: npt.NDArray[np.int32], seed: bytes, *,
        table: PlaneTable | None, slots: npt.NDArray[np.int64], keep: Any,
        groups: int, group: int, seconds: float, post: Callable[[Ticket], None],
    ) -> None:  # fmt: skip
        self.graph, self.tokens, self.seed = graph, tokens, seed
        self.table, self.slots, self.keep = table, slots, keep
        self.groups, self.group = groups, group
        self.started = time.monotonic()
        self.deadline = self.started + seconds
        self.prefill_rate = 0.0
        """Tokens/s at which this engine computes what it does not load; 0: not known."""
        self.stop: npt.NDArray[np.uint8] = np.zeros(1, np.uint8)
        self.guard = threading.Lock()
        """Held by whoever touches the caller's tensors."""
        self.cancelled: Lost | None = None
        self.pieces: list[Piece] = []
        self.kept_already = 0
        self.lost: dict[Lost, int] = {}
        self.delivered: dict[str, int] = {}
        self._count = threading.Lock()
        self.scopes: list[Scope] = []
        self.scopes_open = 0
        self.allowed = groups
        """Layer groups that may be under way; the rest wait for the model."""
        self.emitted = 0
        self.admitted = False
        """Waves may go: memory is promised to all of the request."""
        self.layered = False
        """Frames travel in waves of one layer group."""
        self.window = 0
        """Retrieve in waves: layer groups in flight beyond the one that the model is at."""
        self.head_done = threading.Event()
        self.gates = [threading.Event() for _ in range(groups)]
        self._behind = [0] * groups
        self._post = post
        self.future: Future[Receipt] = Future()
        self.future.set_running_or_notify_cancel()  # given up by `cancel()`, never by the future

    # -- the caller's side ---------------------------------------------------------------------

    def planned(self) -> int:
        """Retrieve: tokens that it sets out to bring, once the plan is made (waits for that)."""
        self.head_done.wait(max(0.0, self.deadline - time.monotonic()))
        return sum(p.take for p in self.pieces) if self.head_done.is_set() else 0

    def wait_layer(self, layer: int) -> int:
        """Retrieve: wait until `layer` is in place; tokens valid for all layers up to its group.

        Never raises: at the deadline it cancels the request and says what is there.
        """
        group = layer // self.group
        self._allow(group + 1, window=True)
        if not self.gates[group].wait(max(0.0, self.deadline - time.monotonic())):
            self.cancel()
        return self.valid(group + 1)

    def layer_done(self, layer: int) -> None:
        """Store: `layer` is computed; layers come in model order. Returns at once."""
        if (layer + 1) % self.group == 0 or layer // self.group == self.groups - 1:
            self._allow(layer // self.group + 1, window=False)

    def captured(self, timeout: float | None = None) -> bool:
        """Store: wait until the caller's memory has been read and may be reused.

        False when time ran out: the request is then cancelled, and memory free all the same.
        """
        end = self.deadline if timeout is None else min(self.deadline, time.monotonic() + timeout)
        for gate in self.gates:
            if not gate.wait(max(0.0, end - time.monotonic())):
                self.cancel()
                return False
        return True

    def wait(self, timeout: float | None = None) -> Receipt:
        """The receipt; at `timeout` or the deadline the request is cancelled and what is there
        counts. The caller's tensors are free when it returns."""
        end = self.deadline if timeout is None else min(self.deadline, time.monotonic() + timeout)
        try:
            return self.future.result(max(0.0, end - time.monotonic()))
        except TimeoutError:
            self.cancel()
            return self.receipt()

    def cancel(self) -> None:
        """Give the request up. Nothing touches the caller's tensors once this has returned."""
        from .errors import Lost

        late = time.monotonic() >= self.deadline
        self.expire(Lost.LATE if late else Lost.CANCELLED)
        with self.guard:
            pass
        self._post(self)

    # -- both sides ----------------------------------------------------------------------------

    def expire(self, code: Lost) -> None:
        """Mark it given up, so that every stage skips it; kernels stop between two frames."""
        if self.cancelled is None and not self.future.done():
            self.cancelled = code
        self.stop[0] = 1

    def valid(self, groups: int) -> int:
        """Tokens of the longest prefix that is placed for the first `groups` layer groups."""
        tokens = 0
        for p in self.pieces:
            if p.done is None or p.lost is not None or not p.done[:groups].all():
                break
            tokens += p.take
            if p.take < p.tokens:
                break
        return tokens

    def receipt(self) -> Receipt:
        """What has become of the request so far."""
        whole = [p for p in self.pieces if p.took and p.lost is None]
        if self.graph == "retrieve":
            tokens = self.valid(self.groups)
        else:
            tokens = self.kept_already + sum(p.tokens for p in whole)
        seconds = time.monotonic() - self.started
        nbytes = sum(p.nbytes for p in whole)
        return Receipt(tokens, nbytes, dict(self.lost), dict(self.delivered), seconds)

    # -- the portal's side ---------------------------------------------------------------------

    def tally(self, code: Lost, n: int = 1) -> None:
        with self._count:  # waves of one request end in several threads
            self.lost[code] = self.lost.get(code, 0) + n

    def deliver(self, tier: str, n: int = 1) -> None:
        self.delivered[tier] = self.delivered.get(tier, 0) + n

    def expect(self, scopes: list[Scope]) -> None:
        """The plan stands: these scopes pass every gate before it opens."""
        self.scopes = scopes
        self.scopes_open = len(scopes)
        self._behind = [len(scopes)] * self.groups
        self.head_done.set()
        if not scopes:
            self.open_gates()

    def passed(self, batch: Batch) -> None:
        """A batch is beyond the engine's memory, or never came that far."""
        if not batch.passed:
            batch.passed = True
            for g in batch.frames:
                self._behind[g] -= 1
                if not self._behind[g]:
                    self.gates[g].set()

    def open_gates(self) -> None:
        self.head_done.set()
        for gate in self.gates:
            gate.set()

    def finish(self) -> None:
        """Resolve the future, once, with what there is."""
        self.open_gates()
        if not self.future.done():
            self.future.set_result(self.receipt())
        self.keep = self.table = None

    def _allow(self, groups: int, *, window: bool) -> None:
        if groups + (self.window if window else 0) > self.allowed:
            self.allowed = min(self.groups, groups + (self.window if window else 0))
            self._post(self)
