"""The paths of a door: the same in every process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse

from tierloom import __version__
from tierloom.adapters.door.collector import FiguresCollector, exposition
from tierloom.adapters.door.readiness import Readiness, readiness

Parts = Mapping[str, Mapping[str, Any]]
"""Figures by part, as `Pipeline.stats` gives them."""
Act = Callable[[str, Mapping[str, Any], str], Awaitable[dict[str, dict[str, Any]]]]
"""Gives all parts an order (`BODIES`), with an id by which `progress` knows it: what came of it by
part, with `error` where it failed. Raises InputError, Closed."""
STREAMS = 16
"""Clients of `/v1/stream`, at once."""


@dataclass(frozen=True, slots=True)
class ProcessStats:
    """The figures of a process."""

    version: str
    status: str
    """ready, degraded or unready."""
    reasons: list[str]
    parts: dict[str, dict[str, Any]]
    """By pipeline, or by worker of an engine; one that does not answer has an `error`."""


class DoorRoutes:
    """The whole application: `app`."""

    def __init__(
        self, read: Callable[[], Awaitable[Parts]], draining: Callable[[], str],
        own: Callable[[], Mapping[str, tuple[str, float]]],
    ) -> None:  # fmt: skip
        """`read` must wait for nobody but other processes. `draining`: why nothing new is taken;
        empty: it is. `own`: more gauges, each with its help."""
        self._read, self._draining, self._own = read, draining, own
        self._streams = 0
        self.app = FastAPI(
            title="tierloom", version=__version__, openapi_url="/v1/openapi.json", docs_url=None,
            redoc_url=None,
        )  # fmt: skip
        self.app.exception_handler(RequestValidationError)(_malformed)
        self.app.exception_handler(UnicodeError)(_no_text)
        get = self.app.get
        get("/livez", summary="The process answers.")(self.alive)
        get("/readyz", responses={503: {"model": Readiness}})(self.ready)
        for alias in ("/healthz", "/health"):
            get(alias, include_in_schema=False)(self.alive)
        get("/metrics", response_class=Response)(self.metrics)
        get("/v1/stats")(self.stats)
        get("/v1/stream", response_class=StreamingResponse)(self.stream)

    async def alive(self) -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    async def ready(self, response: Response) -> Readiness:
        """The first tier works, and nothing is about to end; 503 with the reason where not."""
        said = await self._readiness(await self._read())
        response.status_code = 503 if said.status == "unready" else 200
        return said

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        parts = await self._read()
        collector = FiguresCollector(lambda: parts, own=await self._gauges(parts))
        text, kind = exposition(collector, request.headers.get("accept", ""))
        return Response(text, headers={"content-type": kind})

    async def stats(self) -> ProcessStats:
        """Every counter, as plain numbers."""
        return await self._stats()

    async def stream(self) -> Response:
        """The same once a second, as server-sent events."""
        if self._streams >= STREAMS:
            text = f"/v1/stream: {STREAMS} clients have it already; close one, or ask /v1/stats"
            return JSONResponse({"detail": text}, 503)
        return StreamingResponse(
            self._events(), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )

    async def _events(self) -> AsyncIterator[bytes]:
        self._streams += 1
        try:
            while True:
                yield b"data: " + json.dumps(asdict(await self._stats())).encode() + b"\n\n"
                await asyncio.sleep(1)
        finally:
            self._streams -= 1

    async def _stats(self) -> ProcessStats:
        parts = await self._read()
        said = await self._readiness(parts)
        return ProcessStats(
            __version__, said.status, said.reasons, {n: dict(p) for n, p in parts.items()}
        )

    async def _readiness(self, parts: Parts) -> Readiness:
        return readiness(parts, self._draining())

    async def _gauges(self, parts: Parts) -> dict[str, tuple[str, float]]:
        status = (await self._readiness(parts)).status
        return {
            "ready": ("1 while it is ready or degraded.", float(status != "unready")),
            "degraded": ("1 while a colder tier does not work.", float(status == "degraded")),
            "parts": ("Pipelines, or workers of an engine, of this process.", float(len(parts))),
            "parts_silent": (
                "Parts that do not answer.", float(sum("error" in p for p in parts.values()))
            ),
        } | dict(self._own())  # fmt: skip


async def _malformed(_: object, error: Exception) -> Response:
    """What is wrong with a request, without repeating it: it may be no text at all."""
    assert isinstance(error, RequestValidationError)
    wrong = [{"loc": list(e["loc"]), "msg": e["msg"]} for e in error.errors()[:20]]
    return Response(json.dumps({"detail": wrong}), 422, media_type="application/json")


async def _no_text(_: object, error: Exception) -> Response:
    return JSONResponse({"detail": "text with half of a character: a lone surrogate"}, 422)
