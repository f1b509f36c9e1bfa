"""What the caller of a store or retrieve holds while the pipeline works on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt

from tierloom.stages.blend.policies import Scores
from tierloom.stages.contract.request import Receipt, Request
from tierloom.stages.errors import InputError, Lost
from tierloom.stages.kv.paged_copy import attention_now


class Ticket:
    """A store or retrieve under way, made and used by the caller's threads.

    The request holds the caller's tensors until it is done. After `wait()` has returned, nothing
    reads or writes them any more: a copy in progress is stopped between two frames and waited for.
    """

    __slots__ = ("_device", "_event", "_idle", "_post", "_request", "_scores", "_seconds", "_table")

    def __init__(
        self, request: Request, post: Callable[[Request], None], *, seconds: float,
        idle: float = 0.0, event: Callable[[], Any] = lambda: None, device: str = "cpu",
    ) -> None:  # fmt: skip
        """`post` tells the loop that the model went on, or that the request was cancelled.
        `seconds`: how long the caller will wait. `idle`: not 0 for a request that goes at the
        model's pace; it lives for so long after the model's last call, however long the model
        takes, and each of the model's waits is bounded by `seconds`. `event` records what a copy
        must wait for; see `EngineMemory`. `device`: of the caller's tensors."""
        self._request, self._post, self._event = request, post, event
        self._seconds, self._idle, self._device = seconds, idle, device
        self._table = request.memory.table if request.blend is not None else None
        self._scores: dict[int, npt.NDArray[np.float32]] = {}

    @property
    def future(self) -> Future[Receipt]:
        """Resolved with the receipt. Cancel the ticket, not the future."""
        return self._request.future

    def planned(self) -> int:
        """Retrieve: tokens that it sets out to bring; waits until the plan is made."""
        request = self._request
        request.planned.wait(self._patience())
        return sum(c.wanted for c in request.chunks) if request.planned.is_set() else 0

    def compute(self, scores: Scores | None = None) -> list[tuple[int, int]]:
        """Retrieve with `blend`: stretches (first token, last + 1) that the engine must compute, in
        rising order; waits until the plan is made. `scores`: as `needs` says, or what `scores()`
        was told of each layer; without any, heads and what nobody kept.
        After `wait()` also what was planned and did not come, and less of what was found: until
        this is called, text beyond whole grains is taken as well.
        """
        self._request.planned.wait(self._patience())
        if scores is None and self._scores:
            scores = np.mean(list(self._scores.values()), axis=0)
        return self._request.computed(scores)

    def scores(self, layer: int, queries: Any, *, scale: float | None = None) -> None:
        """Retrieve with `blend` of a policy that needs scores: note what the prompt's last tokens
        attend to in `layer`, which is in place. `queries` [<= 64, heads, dim] of those tokens,
        turned as the model does, in K's dtype, on the caches' device; `scale`: of the logits, by
        default dim^-0.5. K of all that follows the last passage must be in the caches. Waits for
        the device. Raises InputError."""
        request, blended = self._request, self._request.blend
        if blended is None or blended.work is None or self._table is None:
            return
        heads, dim = self._table.heads, self._table.dim
        tokens, behind = len(request.tokens), blended.work.runs[-1].end
        shape = tuple(queries.shape)
        fits = len(shape) == 3 and 0 < shape[0] <= min(64, tokens - behind)
        if not fits or shape[2] != dim or shape[1] % heads or not 0 <= layer < request.layers:
            raise InputError(
                f"scores of layer {layer}: queries {shape}; wanted [1 to {min(64, tokens - behind)}"
                f", a multiple of {heads}, {dim}] of the prompt's last tokens"
            )
        slots = request.memory.slots.copy()
        for first, end in request.missing():
            slots[first : min(end, behind)] = -1
        self._scores[layer] = attention_now(
            self._table, layer, slots, queries, behind, self._device, scale=scale or dim**-0.5
        )

    def missing(self) -> list[tuple[int, int]]:
        """Retrieve with `blend`: of those stretches, what nothing is loaded of: before it is
        computed, its rows hold what the memory held."""
        self._request.planned.wait(self._patience())
        return self._request.missing()

    def repaired(self, seconds: float) -> None:
        """Retrieve with `blend` that has ended: how long computing took. With `blend: {adapt}` the
        next ones are given more or less to compute."""
        blended = self._request.blend
        if blended is not None and self.future.done():
            blended.measured(seconds, self.future.result().seconds)

    @property
    def needs(self) -> str:
        """Retrieve with `blend`: what its policy chooses by: nothing, scores or deviations."""
        blended = self._request.blend
        return blended.needs if blended is not None else "nothing"

    @property
    def attended(self) -> float:
        """Retrieve with `blend` of a policy that needs scores: the share of them that fell on what
        `compute` named last of what was reused; 0 to 1."""
        blended = self._request.blend
        return blended.attended if blended is not None else 0.0

    def wait_layer(self, layer: int) -> int:
        """Retrieve: wait until `layer` is in place; tokens valid for all layers up to its group.

        Never raises: at the deadline it cancels the request and says what is there.
        """
        request = self._request
        group = layer // request.group
        self._allow(group + 1 + request.window)
        if not self._waited(lambda: request.gates.wait(group, self._patience())):
            self.cancel(Lost.LATE)
        return request.valid(group + 1)

    def layer_done(self, layer: int) -> None:
        """Store: `layer` is computed; layers come in model order. Returns at once."""
        request = self._request
        self._go_on()
        if (layer + 1) % request.group == 0 or layer + 1 == request.layers:
            request.memory.event = self._event()
            self._allow(layer // request.group + 1)

    @property
    def is_captured(self) -> bool:
        """Store: the caller's memory may be reused already. A cancelled request has to leave it
        first."""
        memory = self._request.memory
        return (bool(memory.stop[0]) and memory.in_use.empty) or self._request.gates.all_open

    def captured(self, timeout: float | None = None) -> bool:
        """Store: wait until the caller's memory has been read and may be reused.

        False when time ran out: the request is then cancelled, and memory is free all the same.
        """
        if not self._waited(lambda: self._request.gates.wait_all(self._patience(timeout))):
            self.cancel(Lost.LATE if timeout is None else Lost.CANCELLED)
            return False
        return True

    def fence(self, timeout: float) -> bool:
        """Store: what the caller launches on its current stream from now on may overwrite its
        memory. As `captured`, but copies that a device makes are waited for by the stream: the
        caller waits only until they are launched. False: some were not, and will not be."""
        memory = self._request.memory
        if (launches := memory.launches) is None:
            return self.captured(timeout)
        in_time = self._waited(lambda: launches.wait(self._patience(timeout)))
        if not in_time:
            self._request.expire(Lost.LATE)
            self._post(self._request)
            launches.beginning.wait_until_empty()
        launches.hold_back(self._device)
        return in_time

    def wait(self, timeout: float | None = None) -> Receipt:
        """The receipt; at `timeout` or the deadline the request is cancelled and what is there
        counts. The caller's tensors are free when it returns."""
        try:
            return self.future.result(self._patience(timeout))
        except futures.TimeoutError:
            self.cancel(Lost.LATE if timeout is None else Lost.CANCELLED)
            return self._request.receipt()
        except BaseException:  # Ctrl-C: the caller unwinds, and takes its tensors along
            self.cancel()
            raise

    def delivered(self) -> dict[str, int]:
        """Retrieve: tokens that each tier has delivered."""
        return self._request.tokens_by_tier()

    def cancel(self, code: Lost = Lost.CANCELLED) -> None:
        """Cancel the request. Nothing touches the caller's tensors once this has returned."""
        self._request.expire(code)
        self._request.memory.in_use.wait_until_empty()
        self._post(self._request)

    def _waited(self, wait: Callable[[], bool]) -> bool:
        """What `wait` says. Ctrl-C cancels the request."""
        try:
            return wait()
        except BaseException:
            self.cancel()
            raise

    def _go_on(self) -> None:
        """The model is alive: the time of a request at its pace begins anew."""
        if self._idle:
            self._request.deadline = time.monotonic() + self._idle

    def _patience(self, timeout: float | None = None) -> float:
        """Seconds that the caller may be kept waiting from now on."""
        self._go_on()
        left = max(0.0, self._request.deadline - time.monotonic())
        left = self._seconds if self._idle else left
        return left if timeout is None else min(left, timeout)

    def _allow(self, groups: int) -> None:
        """The model has come so far that this many layer groups may be under way."""
        request = self._request
        if groups > request.allowed:
            request.allowed = min(request.groups, groups)
            self._post(request)
