"""One request: its prompt to a prefiller, the request to a decoder, the answer to the client.

    after       the prefiller first; what it answers goes to the decoder
    together    both at once, where it is known how decoders reach the prefiller
    told        the prefiller first, which is told of the decoder; LMCache's engines
    alone       a short prompt, one that the decoder has, one that must be computed whole, or no
                prefiller: the decoder computes
    passed      another path: one decoder is asked

Until the first byte of an answer another engine can be asked; from then on an answer that breaks
is ended as a broken one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from typing import Any

from tierloom.adapters.proxy.bodies import (
    LIMITS,
    ClientBody,
    Refusal,
    addressed,
    given_away,
    prefiller_host,
)
from tierloom.adapters.proxy.fleet import EngineSeat, blocks_of
from tierloom.adapters.proxy.lmcache_side import is_handed
from tierloom.adapters.proxy.parts import ProxyParts
from tierloom.adapters.proxy.relay import HOP, Relay, Send
from tierloom.adapters.proxy.upstream import EngineAnswer, EngineFailed, EngineLate, Headers

log = logging.getLogger("tierloom.proxy")
_TRIES = 2
"""Engines of a role that one request may be sent to: it may be what they died of."""
_WHOLE = 1 << 20
"""Bytes up to which an answer of known length is read to its end before the client gets any of it,
so that another engine can still be asked."""

_GRACE = 1.0
"""Seconds that a prefill has to end when its decoder has answered: most are through by then, and
what they keep is of use later; one that is not yet begun is of none."""


class Exchange:
    """One client's request. `run` is its whole life."""

    def __init__(
        self, parts: ProxyParts, method: str, target: bytes, path: str, headers: Headers, send: Send
    ) -> None:
        self._parts, self._fleet, self._count = parts, parts.fleet, parts.counters.count
        self._method, self._target, self._path = method.encode(), target, path
        given = next((v for n, v in headers if n == b"x-request-id" and v), b"")
        self.relay = Relay(parts, path, given or uuid.uuid4().hex.encode(), send)
        kept = [(n, v) for n, v in headers if n not in HOP and n != b"x-request-id"]
        self._headers = [*kept, (b"x-request-id", self.relay.id)]
        self._blocks: list[int] = []
        self._tokens = 0.0
        self._held: list[EngineSeat] = []
        self._prefill_took = 0.0
        self._engines = {"prefill": "-", "decode": "-"}
        self.way = "passed"

    async def run(self, raw: bytes) -> None:
        """Answer it. `raw`: the body. Raises Refusal while nothing is sent, and EngineFailed when
        an answer broke."""
        beside: asyncio.Task[Any] | None = None
        grace = 0.0
        try:
            if self._path in LIMITS and self._method == b"POST":
                body = ClientBody.parsed(raw, self._path)
                seat, prefiller = self._planned(body)
                told = None
                if self.way == "together" and prefiller is not None:
                    told, beside = self._prefill_beside(prefiller, body)
                elif self.way == "told" and seat is not None:
                    await self._told(seat, prefiller, body)
                elif self.way == "after":
                    raw = body.to_prefill(self._path, given_away())
                    told = await self._prefilled(prefiller, raw)
                    seat = self._fleet.decoder(self._blocks, self._tokens, ())  # by now another
                raw = body.to_decode(told)
            else:
                seat = self._placed(raw)
            await self._decoded(seat, raw)
            grace = _GRACE
        finally:
            if beside is not None:
                asyncio.get_running_loop().call_later(grace, beside.cancel)
            for held in self._held[:]:
                self._let_go(held)

    def _planned(self, body: ClientBody) -> tuple[EngineSeat | None, EngineSeat | None]:
        """A decoder, and a prefiller; settles whether that is worth it."""
        text, count = body.text(), body.token_count()
        self.relay.nbytes = len(text) if count is None else 0
        self._tokens = self._fleet.tokens(len(text)) if count is None else count
        self._blocks = blocks_of(body.model, text)
        seat = self._fleet.decoder(self._blocks, self._tokens, ())
        prefiller = self._fleet.prefiller(self._blocks, self._tokens, ())
        short = seat is not None and self._fresh(seat) < self._parts.local_under
        if body.computed_whole or short or seat is None or prefiller is None:
            self.way = "alone"
        elif self._parts.lmcache is not None:
            self.way = "told" if seat.ports is not None else "alone"
        else:
            known = prefiller.host is not None and self._parts.way != "after"
            self.way = "together" if known else "after"
        return seat, prefiller

    def _fresh(self, seat: EngineSeat) -> float:
        """Tokens that an engine has not had."""
        return self._tokens * (1 - seat.had(self._blocks) / max(1, len(self._blocks)))

    def _placed(self, raw: bytes) -> EngineSeat | None:
        """For a path that is passed: a decoder, or the one that has a stored response."""
        name = self._path.split("/")[3] if self._path.startswith("/v1/responses/") else ""
        if self._path == "/v1/responses":
            body = ClientBody.parsed(raw, self._path)
            name = str(body.said.get("previous_response_id") or "")
            self._blocks = blocks_of(body.model, body.text())
        seat = self._parts.responses.get(name)
        known = seat is not None and seat in self._fleet.seats
        return seat if known else self._fleet.decoder(self._blocks, 0, ())

    async def _told(self, seat: EngineSeat, prefiller: EngineSeat | None, body: ClientBody) -> None:
        """Have a prefiller bring the prompt's KV to a decoder; what does not come is computed."""
        side, ports = self._parts.lmcache, seat.ports
        assert side is not None
        assert ports is not None
        self._hold(seat)
        with side.expected(seat.upstream.host, ports) as prompt:
            raw = body.to_prefill(self._path, prompt.params)
            handed = is_handed(await self._prefilled(prefiller, raw))
            if handed and not await prompt.wait(side.wait):
                self._count("handoffs_total", outcome="late")
                log.warning(
                    "proxy: request %s: no note came from its prefiller in %g s",
                    self.relay.name, side.wait,
                )  # fmt: skip

    async def _prefilled(self, seat: EngineSeat | None, raw: bytes) -> dict[str, Any] | None:
        """What a prefiller hands over; None: the decoder computes. `raw`: what it is asked."""
        tried: list[EngineSeat] = []
        while seat is not None:
            tried.append(seat)
            try:
                return await self._prefill(seat, raw)
            except EngineFailed as error:
                log.warning("proxy: request %s: %s %s", self.relay.name, seat.url, error)
                late = isinstance(error, EngineLate)
            seat = None
            if len(tried) < _TRIES and not late:
                seat = self._fleet.prefiller(self._blocks, self._tokens, tried)
            if seat is not None:
                self._count("retries_total", role="prefill")
        return None

    def _prefill_beside(
        self, seat: EngineSeat, body: ClientBody
    ) -> tuple[dict[str, Any], asyncio.Task[Any]]:
        """Begins a prefill; what the decoder is told of it."""
        transfer_id = f"{self.relay.name[:64]}-{uuid.uuid4().hex}"
        raw = body.to_prefill(self._path, given_away(transfer_id))

        async def prefill() -> None:
            try:
                await self._prefill(seat, raw)
            except EngineFailed as error:
                log.warning("proxy: request %s: %s %s", self.relay.name, seat.url, error)

        return addressed(seat.host or {}, transfer_id), asyncio.create_task(prefill())

    async def _prefill(self, seat: EngineSeat, raw: bytes) -> dict[str, Any] | None:
        """Have one engine compute the prompt. Raises EngineFailed."""
        seat.queued += (fresh := int(self._fresh(seat)))
        self._hold(seat)
        outcome = "failed"
        try:
            asked = self._asked(seat, b"POST", raw, all_of_it=True)
            answer = await seat.within(self._parts.prefill_wait, asked)
            if answer.status >= 500:
                raise EngineFailed(f"answered {answer.status}")
            if answer.status >= 400:  # the decoder says better what the client did wrong
                outcome = "refused"
                return None
            params = self._handed(answer.first)
            seat.answered()
            seat.has(self._blocks)
            outcome = "params" if params else "none"
            seat.host = prefiller_host(params) if params else seat.host
            return params
        finally:
            seat.queued -= fresh
            self._count("handoffs_total", outcome=outcome)
            self._prefill_took = time.monotonic() - self.relay.begun
            self._parts.counters.took("prefill_seconds", self._prefill_took)

    def _handed(self, answer: bytes) -> dict[str, Any] | None:
        """A prefiller's parameters. Raises EngineFailed."""
        try:
            said = json.loads(answer)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise EngineFailed("answered what is not a JSON object")
        params, used = said.get("kv_transfer_params"), said.get("usage")
        if isinstance(used, dict):
            self.relay.correct(used.get("prompt_tokens"))
        return params if isinstance(params, dict) and params else None

    async def _asked(
        self, seat: EngineSeat, method: bytes, raw: bytes, *, all_of_it: bool = False
    ) -> EngineAnswer:
        """An answer of which there is a first byte. Raises EngineFailed."""
        answer = await seat.upstream.ask(method, self._target, self._headers, raw)
        try:
            await answer.begin(_WHOLE, all_of_it=all_of_it)
        except BaseException:
            answer.close()
            raise
        return answer

    async def _decoded(self, seat: EngineSeat | None, raw: bytes) -> None:
        """Have a decoder answer, and send that on. Raises Refusal while nothing is sent."""
        tried: list[EngineSeat] = []
        failures: list[str] = []
        late = False
        while seat is not None:
            tried.append(seat)
            if seat not in self._held:
                self._hold(seat)
            other = None
            if len(tried) < _TRIES:
                other = self._fleet.decoder(self._blocks, self._tokens, tried)
            try:
                asked = self._asked(seat, self._method, raw)
                time_limit, last = self._parts.answer_wait, other is None
                with await seat.within(time_limit, asked, last=last) as answer:
                    if answer.status < 500 or other is None:
                        await self._answered(seat, answer)
                        return
                failures.append(f"{seat.url} answered {answer.status}")
            except EngineFailed as error:
                if self.relay.started:
                    raise
                late = isinstance(error, EngineLate)
                failures.append(f"{seat.url} {error}")
            log.warning("proxy: request %s: %s", self.relay.name, failures[-1])
            self._let_go(seat)
            if (seat := other) is not None:
                self._count("retries_total", role="decode")
        cause, cure = "the proxy has no decoder that takes requests", "add one with --decode"
        if failures:
            cause, cure = f"no decoder answered: {'; '.join(failures)}", "see the engines' logs"
        status = 504 if late else 502 if failures else 503
        raise Refusal(status, f"{self._path}: {cause}; {cure}, and send the request again")

    async def _answered(self, seat: EngineSeat, answer: EngineAnswer) -> None:
        seat.answered()
        seat.has(self._blocks)
        for held in self._held[:]:
            if held is not seat:
                self._let_go(held)  # what the prefiller has was taken, or is not needed
        await self.relay.send_on(seat, answer)

    def _hold(self, seat: EngineSeat) -> None:
        seat.running += 1
        self._held.append(seat)
        self._engines[seat.role] = seat.url

    def _let_go(self, seat: EngineSeat) -> None:
        self._held.remove(seat)
        seat.running -= 1
        self._fleet.settle(seat)

    def line(self, status: int) -> str:
        """For the log, once it is over."""
        took = time.monotonic() - self.relay.begun
        path = "/v1/responses/ID" if self._path.startswith("/v1/responses/") else self._path
        self._count("requests_total", path=path, way=self.way, status=str(status))
        self._parts.counters.took("request_seconds", took)
        return (
            f"request {self.relay.name} {self._path} way={self.way} status={status} "
            f"tokens={self._tokens:.0f} prefiller={self._engines['prefill']} "
            f"decoder={self._engines['decode']} prefill={self._prefill_took:.4f} "
            f"first={self.relay.first_after:.4f} total={took:.4f}"
        )
