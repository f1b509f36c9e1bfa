"""An engine's answer on its way to the client: bytes as they are, and what is learned from them."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import anyio

from tierloom.adapters.proxy.bodies import Refusal
from tierloom.adapters.proxy.fleet import EngineSeat
from tierloom.adapters.proxy.parts import ProxyParts
from tierloom.adapters.proxy.upstream import EngineAnswer, EngineFailed

log = logging.getLogger("tierloom.proxy")
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
HOP = {
    b"connection", b"content-length", b"expect", b"host", b"keep-alive", b"proxy-authenticate",
    b"proxy-authorization", b"proxy-connection", b"te", b"trailer", b"transfer-encoding",
    b"upgrade", b"accept-encoding",
}  # fmt: skip
"""Headers that end at the proxy: of the connection, and compression, in which no error fits."""
STORED = 4096
"""Responses of which it is known where they are stored."""
_USED = re.compile(rb'"prompt_tokens":\s*(\d{1,9})')
_RESPONSE_ID = re.compile(rb'"id":\s*"(resp_[\w-]{1,200})"')


class Relay:
    """The way to one client. `nbytes`: of the prompt's text, if its tokens are not known."""

    def __init__(self, parts: ProxyParts, path: str, request_id: bytes, send: Send) -> None:
        self._parts, self._path, self._send = parts, path, send
        self.id = request_id
        self.begun = time.monotonic()
        self.first_after = 0.0
        self.status, self.nbytes = 0, 0

    @property
    def started(self) -> bool:
        """Some of an answer was sent: no other engine can be asked."""
        return self.status != 0

    async def send_on(self, seat: EngineSeat, answer: EngineAnswer) -> None:
        """Raises EngineFailed if the answer breaks: its client has seen that, too."""
        first, rest = answer.first, answer.rest
        self.status = answer.status
        self.first_after = time.monotonic() - self.begun
        self._parts.counters.took("first_byte_seconds", self.first_after)
        headers = [(n, v) for n, v in answer.headers if n not in HOP]
        if rest is None:
            headers.append((b"content-length", b"%d" % len(first)))
        if not any(n == b"x-request-id" for n, _ in headers):
            headers.append((b"x-request-id", self.id))
        send = self._send
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        self._learn(seat, first)
        if rest is not None:
            with anyio.CancelScope() as scope:
                seat.streaming.add(scope)
                try:
                    await send({"type": "http.response.body", "body": first, "more_body": True})
                    async for piece in rest:
                        if b'"prompt_tokens"' in piece:
                            self._learn(seat, piece)
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                except EngineFailed as error:
                    await self._broken(seat, answer, str(error))
                    raise
                finally:
                    seat.streaming.discard(scope)
            if scope.cancelled_caught:
                await self._broken(seat, answer, why := "answers no probes any more")
                raise EngineFailed(why)
            first = b""
        await send({"type": "http.response.body", "body": first})

    async def _broken(self, seat: EngineSeat, answer: EngineAnswer, why: str) -> None:
        self._parts.counters.count("broken_streams_total")
        log.warning("proxy: request %s: %s %s", self.name, seat.url, why)
        kind = next((v for n, v in answer.headers if n == b"content-type"), b"")
        if kind.startswith(b"text/event-stream"):
            said = Refusal(502, f"{self._path}: {seat.url} {why}; send the request again")
            event = f"data: {json.dumps(said.body)}\n\n".encode()
            await self._send({"type": "http.response.body", "body": event, "more_body": True})

    def _learn(self, seat: EngineSeat, piece: bytes) -> None:
        """How long the prompt was, which response is stored where."""
        if self._path == "/v1/responses" and (found := _RESPONSE_ID.search(piece)):
            stored = self._parts.responses
            stored[found[1].decode()] = seat
            if len(stored) > STORED:
                del stored[next(iter(stored))]
        if self.nbytes and (used := _USED.search(piece)):
            self.correct(int(used[1]))

    def correct(self, tokens: Any) -> None:
        """`tokens`: what an engine counted in the prompt."""
        if self.nbytes and isinstance(tokens, int):
            self._parts.fleet.correct(self.nbytes, tokens)
            self.nbytes = 0

    @property
    def name(self) -> str:
        """The request's, for logs."""
        return self.id.decode("latin-1")
