"""The proxy's own HTTP side: which paths go to engines, and which are its own."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tierloom.adapters.proxy.bodies import LIMITS, MOST_BYTES, ClientBody, Refusal
from tierloom.adapters.proxy.exchange import Exchange
from tierloom.adapters.proxy.fleet import EngineSeat
from tierloom.adapters.proxy.lmcache_side import ReceiverPorts
from tierloom.adapters.proxy.parts import ProxyParts
from tierloom.adapters.proxy.relay import Send
from tierloom.adapters.proxy.upstream import EngineFailed
from tierloom.stages.errors import ConfigError

if TYPE_CHECKING:
    from starlette.requests import Request

log = logging.getLogger("tierloom.proxy")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
PASSED = {
    "/v1/models": "GET", "/v1/embeddings": "POST", "/v1/responses": "POST", "/tokenize": "POST",
    "/v1/responses/{id}": "GET", "/v1/responses/{id}/cancel": "POST", "/detokenize": "POST",
}  # fmt: skip
"""Paths that go to one decoder, beside those that are handed off."""
GONE = 499
"""Status in logs and metrics of a request whose client left."""


class Forwarding:
    """Paths that engines answer, as an ASGI application."""

    def __init__(self, parts: ProxyParts) -> None:
        self._parts = parts

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        path, query = scope.get("raw_path") or scope["path"].encode(), scope["query_string"]
        method = scope["method"].replace("HEAD", "GET")  # the server leaves the body out
        target = path + b"?" + query if query else path
        exchange = Exchange(self._parts, method, target, scope["path"], scope["headers"], send)
        status = GONE
        try:
            raw = await self._body(scope, receive)
            with anyio.CancelScope() as all_of_it:
                watch = asyncio.create_task(_until_gone(receive, all_of_it))
                try:
                    await exchange.run(raw)
                    status = exchange.relay.status
                finally:
                    watch.cancel()
            if status == GONE:
                self._parts.counters.count("gone_total")
        except Refusal as refusal:
            status = refusal.status
            await _refused(scope, refusal)(scope, receive, send)
        except EngineFailed:
            status = 502  # the server ends a connection whose answer has no end
        except _ClientGone:
            self._parts.counters.count("gone_total")
        except Exception:
            log.exception("proxy: request %s", exchange.relay.name)
            status = 502
            if not exchange.relay.started:
                failed = Refusal(status, f"{scope['path']}: the proxy failed; see its log")
                await _refused(scope, failed)(scope, receive, send)
        finally:
            log.info("proxy: %s", exchange.line(status))

    async def _body(self, scope: Any, receive: Receive) -> bytes:
        """Raises Refusal and _ClientGone."""
        said = next((v for n, v in scope["headers"] if n == b"content-length"), b"0")
        parts: list[bytes] = []
        left, more = MOST_BYTES, not said.isdigit() or int(said) <= MOST_BYTES
        while more and left >= 0:
            try:
                with anyio.fail_after(self._parts.body_wait):
                    message = await receive()
            except TimeoutError:
                raise Refusal(
                    408, f"{scope['path']}: the body's next byte did not come in "
                    f"{self._parts.body_wait:g} s; send it in one go",
                ) from None  # fmt: skip
            if message["type"] == "http.disconnect":
                raise _ClientGone
            parts.append(message.get("body", b""))
            left -= len(parts[-1])
            more = message.get("more_body", False)
            if not more and left >= 0:
                return parts[0] if len(parts) == 1 else b"".join(parts)
        raise Refusal(
            413, f"{scope['path']}: the body has more than {MOST_BYTES} bytes; send images by URL, "
            "or ask an engine directly",
        )  # fmt: skip


class _ClientGone(Exception):
    pass


async def _until_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _refused(_: Any, error: Exception) -> Response:
    """In OpenAI's shape. What is left of a body that was too much is not read."""
    assert isinstance(error, Refusal)
    headers = {"connection": "close"} if error.status in (408, 413) else {}
    return JSONResponse(error.body, error.status, headers)


class ProxyRoutes:
    """The whole application: `app`."""

    def __init__(self, parts: ProxyParts) -> None:
        self.parts = parts
        forwarding = Forwarding(parts)
        engines = [Route(path, forwarding, methods=["POST"]) for path in LIMITS]
        engines += [Route(path, forwarding, methods=[m]) for path, m in PASSED.items()]
        self.app = Starlette(
            routes=[
                *engines,
                Route("/v1/proxy/engines", self.engines, methods=["GET", "POST"]),
                Route("/metrics", self.metrics),
                Route("/livez", self.alive),
                *(Route(path, self.ready) for path in ("/readyz", "/health")),
            ],
            exception_handlers={Refusal: _refused, HTTPException: self.unknown},
            lifespan=self.lifespan,
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Engines are probed from start to end."""
        watch = asyncio.create_task(self.parts.fleet.watch(self.parts.probe))
        side = self.parts.lmcache
        notes = asyncio.create_task(side.listen()) if side is not None else None
        yield
        watch.cancel()
        if side is not None and notes is not None:
            notes.cancel()
            side.close()
        for seat in self.parts.fleet.seats:
            seat.upstream.close(for_good=True)

    async def engines(self, request: Request) -> Response:
        """Which there are; add, drain, remove one. Raises Refusal."""
        token, given = self.parts.token, request.headers.get("authorization", "").encode("latin-1")
        if token and not hmac.compare_digest(given, b"Bearer " + token):
            raise Refusal(401, "/v1/proxy/engines: send the proxy's token as Authorization: Bearer")
        if request.method == "POST":
            kind = request.headers.get("content-type", "").partition(";")[0].strip()
            if kind != "application/json":  # no page that a browser shows can send it unasked
                raise Refusal(415, "/v1/proxy/engines: send Content-Type: application/json")
            said = ClientBody.parsed(await request.body(), "/v1/proxy/engines").said
            self._order(said.get("action", "add"), said.get("url"), said.get("role"), said)
        return JSONResponse({"engines": [_shown(seat) for seat in self.parts.fleet.seats]})

    def _order(self, action: Any, url: Any, role: Any, said: Mapping[str, Any]) -> None:
        """Raises Refusal."""
        fleet = self.parts.fleet
        if action not in ("add", "drain", "remove") or role not in ("prefill", "decode"):
            raise Refusal(
                400, '/v1/proxy/engines: send {"action": "add", "drain" or "remove", "role": '
                '"prefill" or "decode", "url": "http://HOST:PORT"}',
            )  # fmt: skip
        try:
            if action == "add":
                ports = ReceiverPorts.parsed(str(said["receiver"])) if "receiver" in said else None
                seat = fleet.add(str(url), role, ports)
            else:
                seat = fleet.known(str(url), role)
                (fleet.drain if action == "drain" else fleet.remove)(seat)
        except ConfigError as error:
            raise Refusal(400, f"/v1/proxy/engines: {error}") from None
        log.info("proxy: %s %s engine %s", action, role, seat.url)

    async def metrics(self, _: Request) -> Response:
        """For Prometheus."""
        text = self.parts.counters.text(self.parts.fleet)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def alive(self, _: Request) -> Response:
        """The proxy runs."""
        return PlainTextResponse("ok\n")

    async def ready(self, _: Request) -> Response:
        """Some engine answers requests. Raises Refusal."""
        if not self.parts.fleet.is_ready:
            raise Refusal(503, "/readyz: no decoder is up; start one, or add one")
        return PlainTextResponse("ok\n")

    def unknown(self, request: Request, error: Exception) -> Response:
        """A path or method that the proxy has not."""
        status = error.status_code if isinstance(error, HTTPException) else 500
        text = f"{request.method} {request.url.path}: not a path of the proxy"
        return _refused(request, Refusal(status, f"{text}; ask an engine directly"))


def _shown(seat: EngineSeat) -> dict[str, Any]:
    return {
        "url": seat.url, "role": seat.role, "up": seat.is_up, "draining": seat.draining,
        "requests": seat.running, "queued_tokens": seat.queued,
    }  # fmt: skip
