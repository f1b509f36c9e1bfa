"""One request's passage: the caller's side, the portal's side, and what they share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tierloom.stages.errors import Lost
from tierloom.stages.memory.arena import Lease
from tierloom.triton_kernels.memory.tables import PlaneTable

if TYPE_CHECKING:
    import numpy.typing as npt

    from tierloom.stages.contract.batch import Batch, Piece, Scope, Span


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


class Presence:
    """Who is at the caller's memory just now: several copies may be, and a caller can wait for the
    last of them to leave."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0

    def __enter__(self) -> None:
        with self._changed:
            self._inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._inside -= 1
            if not self._inside:
                self._changed.notify_all()

    @property
    def empty(self) -> bool:
        return not self._inside

    def wait_until_empty(self) -> None:
        with self._changed:
            while self._inside:
                self._changed.wait()


class Ticket:
    """One request's passage. Made by the caller's thread, worked on by the portal's.

    It holds the caller's tensors until it is done. After `wait()` has returned, nothing reads or
    writes them any more: a copy that is under way is stopped between two frames and waited for.
    """

    def __init__(
        self, graph: str, tokens: npt.NDArray[np.int32], seed: bytes, *,
        table: PlaneTable | None, slots: npt.NDArray[np.int64], keep: Any,
        layers: int, group: int, seconds: float, post: Callable[[Ticket], None],
        fence: Callable[[], Any] = lambda: None, idle: float = 0.0, span: Span | None = None,
    ) -> None:  # fmt: skip
        """`seconds`: how long the caller will wait. `idle`: not 0 for a request that goes at the
        model's pace; it lives so long beyond the model's last call, however long the model takes,
        and each of the model's waits is bounded by `seconds`."""
        self.graph, self.tokens, self.seed = graph, tokens, seed
        self.span = span
        """Instead of `tokens` and `seed`: the chunks' names, where the caller knows them."""
        self.table, self.slots, self.keep = table, slots, keep
        self.layers, self.group = layers, group
        self.groups = groups = -(-layers // group)
        self._fence, self.fence = fence, fence()
        """CUDA: an event of the engine's stream, behind which its memory may be read or written."""
        self.started = time.monotonic()
        self._seconds, self._idle = seconds, idle
        self.deadline = self.started + (idle or seconds)
        self.prefill_rate = 0.0
        """Tokens/s at which this engine computes what it does not load; 0: not known."""
        self.stop: npt.NDArray[np.uint8] = np.zeros(1, np.uint8)
        self.touching = Presence()
        """Entered by whoever touches the caller's tensors; inside, `stop` must be looked at."""
        self.cancelled: Lost | None = None
        self.pieces: list[Piece] = []
        self.enough = 1 << 62
        """Retrieve: from this chunk on, computing is quicker than reading."""
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
        """Memory was asked for."""
        self.promised = False
        """In waves: memory is promised to all of the request."""
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
        self.head_done.wait(self._patience())
        return sum(p.take for p in self.pieces) if self.head_done.is_set() else 0

    def wait_layer(self, layer: int) -> int:
        """Retrieve: wait until `layer` is in place; tokens valid for all layers up to its group.

        Never raises: at the deadline it cancels the request and says what is there.
        """
        group = layer // self.group
        self._allow(group + 1, window=True)
        if not self.gates[group].wait(self._patience()):
            self.cancel(Lost.LATE)
        return self.valid(group + 1)

    def layer_done(self, layer: int) -> None:
        """Store: `layer` is computed; layers come in model order. Returns at once."""
        self._go_on()
        if (layer + 1) % self.group == 0 or layer + 1 == self.layers:
            self.fence = self._fence()
            self._allow(layer // self.group + 1, window=False)

    @property
    def is_captured(self) -> bool:
        """Store: the caller's memory may be reused already. A request that was given up has still
        to leave it."""
        stopped = bool(self.stop[0]) and self.touching.empty
        return stopped or all(gate.is_set() for gate in self.gates)

    def captured(self, timeout: float | None = None) -> bool:
        """Store: wait until the caller's memory has been read and may be reused.

        False when time ran out: the request is then cancelled, and memory free all the same.
        """
        end = time.monotonic() + self._patience(timeout)
        for gate in self.gates:
            if not gate.wait(max(0.0, end - time.monotonic())):
                self.cancel(Lost.LATE if timeout is None else Lost.CANCELLED)
                return False
        return True

    def wait(self, timeout: float | None = None) -> Receipt:
        """The receipt; at `timeout` or the deadline the request is cancelled and what is there
        counts. The caller's tensors are free when it returns."""
        try:
            return self.future.result(self._patience(timeout))
        except futures.TimeoutError:
            self.cancel(Lost.LATE if timeout is None else Lost.CANCELLED)
            return self.receipt()

    def cancel(self, code: Lost = Lost.CANCELLED) -> None:
        """Give the request up. Nothing touches the caller's tensors once this has returned."""
        self.expire(code)
        self.touching.wait_until_empty()
        self._post(self)

    # -- both sides ----------------------------------------------------------------------------

    def expire(self, code: Lost) -> None:
        """Mark it given up, so that every stage skips it; kernels stop between two frames."""
        if self.cancelled is None and not self.future.done():
            self.cancelled = code
        self.stop[0] = 1

    def valid(self, groups: int) -> int:
        """Tokens of the longest prefix that is placed for the first `groups` layer groups."""
        tokens, wanted = 0, (1 << groups) - 1
        for p in self.pieces:
            if p.lost is not None or p.done & wanted != wanted:
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

    def done_with(self, piece: Piece, frames: range) -> bool:
        """Layer groups of a piece are gathered, or placed; True for the one who had the last."""
        bits = (1 << frames.stop) - (1 << frames.start)
        with self._count:  # waves of one request end in several threads
            before, piece.done = piece.done, piece.done | bits
            return before != piece.done == (1 << self.groups) - 1

    def leases(self) -> tuple[Lease, ...]:
        """What a call on it touches besides the caller's memory: nothing before it is cut."""
        return ()

    def tally(self, code: Lost, n: int = 1) -> None:
        with self._count:
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

    def _go_on(self) -> None:
        """The model is alive: a paced request's time begins anew."""
        if self._idle:
            self.deadline = time.monotonic() + self._idle

    def _patience(self, timeout: float | None = None) -> float:
        """Seconds that the caller may be kept waiting from now on."""
        self._go_on()
        left = self._seconds if self._idle else max(0.0, self.deadline - time.monotonic())
        return left if timeout is None else min(left, timeout)

    def _allow(self, groups: int, *, window: bool) -> None:
        if groups + (self.window if window else 0) > self.allowed:
            self.allowed = min(self.groups, groups + (self.window if window else 0))
            self._post(self)
