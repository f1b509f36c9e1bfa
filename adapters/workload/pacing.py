"""Sessions side by side, whose requests begin at a rate that the engine does not set."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tierloom.adapters.workload.openai_stream import Messages, OpenAIStream, Sample
from tierloom.adapters.workload.workloads import Session

WITHOUT = {"kv_transfer_params": {"tierloom.skip_load": True, "tierloom.skip_save": True}}
"""More of a body, by which a server with tierloom loads and keeps nothing."""
_AFTER_FAILURE = 0.2
"""Seconds that a session waits after a request that failed, so that no server is flooded."""


class _TimeOver(Exception):
    """No request begins any more."""


class Pacing:
    """`users` sessions at once; one that ends is replaced by the next. For one event loop."""

    def __init__(
        self, server: OpenAIStream, *, users: int, qps: float, poisson: bool, seed: int,
        answer_len: int, seconds: float, warmup: float, control: bool, name_users: bool = False,
        first_user: int = 0,
    ) -> None:  # fmt: skip
        """`qps`: requests that begin per second, of all sessions together; 0: as soon as one may.
        `seconds`: after which none begins; 0: no limit. `warmup`: seconds whose requests count as
        warm-up. `control`: every second session asks for nothing to be loaded."""
        self._server, self._users, self._answer = server, users, answer_len
        self._qps, self._poisson, self._random = qps, poisson, random.Random(seed)
        self._seconds, self._warmup, self._control = seconds, warmup, control
        self._name_users, self._first_user = name_users, first_user
        self._turn = asyncio.Lock()
        self.samples: list[Sample] = []
        self.began = self._due = 0.0
        self.under_way = 0

    async def run(self, sessions: Iterator[Session]) -> None:
        """Until all sessions have ended, or the time is over and what was begun has ended."""
        self.began = self._due = time.perf_counter()
        numbered = enumerate(sessions)

        async def user() -> None:
            with contextlib.suppress(_TimeOver):
                for number, session in numbered:
                    await session(self._asking(number))

        await asyncio.gather(*(user() for _ in range(self._users)))

    def _asking(self, number: int) -> Callable[..., Any]:
        arm = "without" if self._control and number % 2 else "with"
        more: Mapping[str, Any] = WITHOUT if arm == "without" else {}
        name = [(b"x-user-id", str(self._first_user + number).encode())] * self._name_users

        async def ask(messages: Messages, round: int, wanted: int = 0) -> str | None:
            late = await self._my_turn()
            self.under_way += 1
            try:
                sample = await self._server.ask(messages, self._answer, more, name)
            finally:
                self.under_way -= 1
            sample.session, sample.round, sample.arm = number, round, arm
            sample.late, sample.wanted = late, wanted
            sample.warm = sample.sent - self.began >= self._warmup
            self.samples.append(sample)
            if sample.error:
                await asyncio.sleep(_AFTER_FAILURE)
                return None
            return sample.text

        return ask

    async def _my_turn(self) -> float:
        """Wait until a request is due, in the order of asking; by how much it is late. Raises
        _TimeOver."""
        async with self._turn:
            now = time.perf_counter()
            if self._qps:
                due = self._due
                step = self._random.expovariate(self._qps) if self._poisson else 1 / self._qps
                self._due = due + step
            else:
                due = now
            if self._seconds and max(due, now) - self.began >= self._seconds:
                raise _TimeOver
            if due > now:
                await asyncio.sleep(due - now)
            return max(0.0, now - due)


async def differing(
    server: OpenAIStream, samples: list[Sample], answer_len: int, done: Callable[[], None]
) -> dict[str, Any]:
    """Ask again, one after another, with nothing loaded and under a salt of its own, so that the
    engine computes all of it; which greedy answers are other ones. `done` is told of each."""
    different, refused, first = 0, 0, ""
    for i, sample in enumerate(samples):
        more = WITHOUT | {"cache_salt": f"verify {i} {time.time_ns()}"}
        again = await server.ask(sample.messages, answer_len, more)
        done()
        if again.error:
            refused += 1
            first = first or f"cannot be asked again: {again.error}: {again.detail}"
        elif again.text != sample.text:
            different += 1
            at = next((n for n, (a, b) in enumerate(zip(again.text, sample.text, strict=False))
                       if a != b), min(len(again.text), len(sample.text)))  # fmt: skip
            first = first or (
                f"session {sample.session}, round {sample.round}: from character {at} on "
                f"{sample.text[at : at + 40]!r}, and {again.text[at : at + 40]!r} where computed"
            )
    return {"asked": len(samples), "different": different, "refused": refused, "first": first}
