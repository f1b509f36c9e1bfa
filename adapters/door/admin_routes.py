"""The orders of a door: the same in every process, one line in its log for each."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import anyio
from fastapi.responses import JSONResponse, Response

from tierloom.adapters.door.routes import Act
from tierloom.pipeline.admin.admin_bodies import BODIES, NoBody
from tierloom.stages.errors import InputError, TierloomError

if TYPE_CHECKING:
    from fastapi import FastAPI

_LONGEST = 600.0
"""Seconds that an order may take."""


@dataclass(frozen=True, slots=True)
class OrderAnswer:
    """What came of an order."""

    order: str
    parts: dict[str, dict[str, Any]]
    """By pipeline, or by worker of an engine; one that did not do it has an `error`."""


class AdminRoutes:
    """`POST /v1/ORDER`, and `GET` of what only asks."""

    def __init__(self, app: FastAPI, act: Act) -> None:
        self._act = act
        for order, made in BODIES.items():
            add = app.get if made is NoBody else app.post
            add(f"/v1/{order}", response_model=OrderAnswer, summary=made.__doc__)(
                self._route(order, made)
            )
        app.exception_handler(InputError)(_wrong)

    def _route(self, order: str, made: type[Any]) -> Callable[..., Coroutine[Any, Any, Response]]:
        async def ask() -> Response:
            return await self._give(order, NoBody())

        async def give(body: Any) -> Response:
            return await self._give(order, body)

        give.__annotations__["body"] = made
        return ask if made is NoBody else give

    async def _give(self, order: str, body: Any) -> Response:
        try:
            with anyio.fail_after(_LONGEST):
                parts = await self._act(order, asdict(body))
        except TimeoutError:
            return JSONResponse({"detail": f"{order}: not done within {_LONGEST:g} s"}, 504)
        except InputError:
            raise
        except TierloomError as error:
            return JSONResponse({"detail": f"{order}: {error}"}, 503)
        failed = any("error" in part for part in parts.values())
        return JSONResponse({"order": order, "parts": parts}, 502 if failed else 200)


async def _wrong(_: object, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, 422)
