"""One request as the graph's runner and its stages see it; its caller holds a `Ticket`."""

from __future__ import annotations

import threading
import time
import warnings
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tierloom.stages.blend.policies import Mask, Patchwork, Scores, stretches
from tierloom.stages.contract.blended import Blended
from tierloom.stages.contract.chunks import Chunk
from tierloom.stages.contract.gates import InUseCounter, Launches, LayerGates
from tierloom.stages.errors import Lost
from tierloom.stages.kv.object import Object
from tierloom.stages.kv.prefix import Span
from tierloom.stages.memory.arena import Lease
from tierloom.triton_kernels.memory.tables import PlaneTable


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
    """From the call to the end of the last chunk."""
    blended: int = 0
    """Retrieve: tokens behind the prefix that are in place for every layer, captured elsewhere."""

    def _repr_html_(self) -> str:
        from tierloom.stages.display.receipt_picture import receipt_svg

        lost = {code.name.lower(): n for code, n in self.lost.items()}
        return receipt_svg(self.tokens, self.nbytes, lost, self.tiers, self.seconds, self.blended)


class EngineMemory:
    """The caller's tensors, as long as the request may touch them."""

    def __init__(
        self, table: PlaneTable | None, slots: npt.NDArray[np.int64], owner: Any,
        event: Any = None, launches: Launches | None = None,
    ) -> None:  # fmt: skip
        """`owner`: kept alive until the request is done. Others: see the attributes."""
        self.table, self.slots, self._owner = table, slots, owner
        self.event = event
        """CUDA: an event of the engine's stream; the memory may be touched after it."""
        self.launches = launches
        """Copies that a device makes; None: it is a CPU's memory."""
        self.stop: npt.NDArray[np.uint8] = np.zeros(1, np.uint8)
        """Not 0: kernels stop between two frames, and no copy begins."""
        self.in_use = InUseCounter()
        """Entered by whoever touches the tensors; inside, `stop` must be looked at."""

    def forget(self) -> None:
        self.table = self._owner = None


class Request:
    """Made by the caller's thread, worked on by the loop's and by the pool's."""

    def __init__(
        self, graph: str, tokens: npt.NDArray[np.int32], seed: bytes, memory: EngineMemory, *,
        layers: int, group: int, deadline: float, span: Span | None = None,
        prefill_rate: float = 0.0,
    ) -> None:  # fmt: skip
        """`deadline`: in seconds of `time.monotonic()`."""
        self.graph, self.tokens, self.seed, self.span = graph, tokens, seed, span
        """`span` instead of `tokens` and `seed`: the chunks' names, where the caller knows them."""
        self.memory = memory
        self.layers, self.group, self.groups = layers, group, -(-layers // group)
        self.started = time.monotonic()
        self.trace = ""
        """Whose part it is, for who follows requests: a `traceparent` as W3C writes it."""
        self.deadline = deadline
        """A model that goes on moves it, where the request goes at the model's pace."""
        self.prefill_rate = prefill_rate
        """Tokens/s at which this engine computes what it does not load; 0: not known."""
        self.chunks: list[Chunk] = []
        """What is planned: the chunks to read, or to keep."""
        self.compute_from = 1 << 62
        """Retrieve: from this chunk on, computing is quicker than reading."""
        self.kept_already = 0
        """Store: tokens that every tier had."""
        self.held: dict[bytes, Object] = {}
        """Retrieve: objects by key that the caller holds until it is done; nothing is looked up."""
        self.spare = 0
        """Store: tokens, from the first on, that `memory` does not hold; whole grains, of which a
        chunk takes those that it needs from what is kept."""
        self.blend: Blended | None = None
        """Retrieve: text that was captured elsewhere will do, too."""
        self.exact = 1 << 62
        """Store: tokens whose KV was computed over nothing that stood elsewhere."""
        self.root = span.root if span is not None else seed
        """The link before the prompt's first token."""
        self.first = max(0, span.start) if span is not None else 0
        """The position in the prompt of its first token."""
        self.opening = span.opening if span is not None else b""
        """The link after the prompt's first 64 tokens; see `Text.opening`."""
        self.cancelled: Lost | None = None
        self.lost: dict[Lost, int] = {}
        self.delivered: dict[str, int] = {}
        self.planned = threading.Event()
        self.gates = LayerGates(self.groups)
        self.allowed = self.groups
        """Layer groups that may be under way; the rest wait for the model."""
        self.layered = False
        """Frames travel in waves of one layer group."""
        self.window = 0
        """Retrieve in waves: layer groups in flight beyond the one that the model is at."""
        self.future: Future[Receipt] = Future()
        self.future.set_running_or_notify_cancel()  # ended by `Ticket.cancel`, never by the future
        self._count = threading.Lock()
        self.changing = threading.Lock()
        """Held by who changes the plan of a blend, or takes it for the last word."""

    # -- any thread ----------------------------------------------------------------------------

    def expire(self, code: Lost) -> None:
        """Mark it cancelled, so that every stage skips it; kernels stop between two frames."""
        if self.cancelled is None and not self.future.done():
            self.cancelled = code
        self.memory.stop[0] = 1

    def valid(self, groups: int) -> int:
        """Tokens of the longest prefix that is placed for the first `groups` layer groups."""
        tokens, wanted = 0, (1 << groups) - 1
        for chunk in self.chunks:
            if chunk.excerpt is not None or chunk.lost is not None or chunk.done & wanted != wanted:
                break
            tokens += chunk.wanted
        return tokens

    def computed(self, scores: Scores | None = None) -> list[tuple[int, int]]:
        """Stretches (first token, last + 1) that the engine must compute: what was not found, what
        the policy takes by `scores` (see `Blended.mask`), and what was found and did not come."""
        if self.blend is None or self.blend.work is None:
            have = self.valid(self.groups) if self.future.done() else self._planned_tokens
            return [(have, len(self.tokens))] if have < len(self.tokens) else []
        with self.changing:
            self.blend.fixed = True
            return stretches(self.blend.mask(scores) | self._missing(self.blend.work))

    def missing(self) -> list[tuple[int, int]]:
        """Stretches of which nothing is loaded: not found, or found and not come."""
        if self.blend is None or self.blend.work is None:
            return self.computed()
        return stretches(self._missing(self.blend.work))

    def _missing(self, work: Patchwork) -> Mask:
        mask = ~work.covered()
        mask[: work.exact] = False
        # At the deadline it is answered at once, and what is under way is marked lost later.
        over, all_of_it = self.cancelled is not None or self.future.done(), (1 << self.groups) - 1
        for chunk in self.chunks:
            if chunk.lost is not None or (over and chunk.done != all_of_it):
                mask[chunk.start : chunk.start + chunk.wanted] = True
        return mask

    @property
    def _planned_tokens(self) -> int:
        return sum(c.wanted for c in self.chunks)

    def receipt(self) -> Receipt:
        """What has become of it so far."""
        whole = [c for c in self.chunks if c.took and c.lost is None]
        if self.graph == "retrieve":
            tokens = self.valid(self.groups)
        else:
            tokens = self.kept_already + sum(c.tokens for c in whole)
        seconds = time.monotonic() - self.started
        nbytes = sum(c.nbytes for c in whole)
        whole_wave = (1 << self.groups) - 1
        blended = sum(c.wanted for c in whole if c.excerpt is not None and c.done == whole_wave)
        return Receipt(tokens, nbytes, dict(self.lost), dict(self.delivered), seconds, blended)

    def done_with(self, chunk: Chunk, frames: range) -> bool:
        """Layer groups of a chunk are gathered, or placed; True for the caller of the last."""
        bits = (1 << frames.stop) - (1 << frames.start)
        with self._count:  # waves of one request end in several threads
            before, chunk.done = chunk.done, chunk.done | bits
            return before != chunk.done == (1 << self.groups) - 1

    def tokens_by_tier(self) -> dict[str, int]:
        """Of a retrieve: tokens that each tier has delivered."""
        tokens: dict[str, int] = {}
        for chunk in self.chunks:
            for tier in chunk.took if chunk.lost is None else ():
                tokens[tier] = tokens.get(tier, 0) + chunk.wanted
        return tokens

    def tally(self, code: Lost, n: int = 1) -> None:
        with self._count:
            self.lost[code] = self.lost.get(code, 0) + n

    @property
    def pieces(self) -> list[Chunk]:
        """The chunks, under the name that they had until 0.1."""
        warnings.warn("request.pieces is request.chunks", DeprecationWarning, stacklevel=2)
        return self.chunks

    @pieces.setter
    def pieces(self, chunks: list[Chunk]) -> None:
        self.chunks = chunks

    # -- the loop --------------------------------------------------------------------------------

    def leases(self) -> tuple[Lease, ...]:
        """What a call on it touches besides the caller's memory: nothing before it has batches."""
        return ()

    def expect(self, batches: int) -> None:
        """So many will pass the stage that touches the caller's memory, in one wave or several."""
        self.gates.expect(batches)
        if self.memory.launches is not None:
            self.memory.launches.expect(batches * self.groups)

    def deliver(self, tier: str, n: int = 1) -> None:
        self.delivered[tier] = self.delivered.get(tier, 0) + n

    def finish(self) -> None:
        """Answer it, once, with what there is."""
        self.planned.set()
        self.gates.open()
        if self.memory.launches is not None:
            self.memory.launches.expect(0)
        if not self.future.done():
            self.future.set_result(self.receipt())
        self.memory.forget()
