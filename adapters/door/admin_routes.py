"""The orders of a door: the same in every process, one line in its log for each."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Header
from fastapi.responses import JSONResponse, Response

from tierloom.adapters.door.order_book import OrderBook
from tierloom.adapters.door.routes import Act
from tierloom.pipeline.admin.admin_bodies import BODIES, NoBody
from tierloom.stages.errors import InputError, TierloomError
from tierloom.stages.options import parse_seconds

if TYPE_CHECKING:
    from fastapi import FastAPI

LONGEST = 600.0
"""Seconds that an order may take."""
_STATUS = {"done": 200, "failed": 502, "late": 504}


@dataclass(frozen=True, slots=True)
class OrderAnswer:
    """What came of an order."""

    id: str
    order: str
    state: str
    """running, done, failed, or late: its deadline came first."""
    parts: dict[str, dict[str, Any]]
    """By pipeline, or by worker of an engine; one that did not do it has an `error`. While it runs:
    chunks done, and asked."""
    detail: str = ""


class AdminRoutes:
    """`POST /v1/ORDER`, and `GET` of what only asks. An order with an `Idempotency-Key` is done
    once; with a `Deadline`, until then."""

    def __init__(self, app: FastAPI, act: Act) -> None:
        self._act, self._book = act, OrderBook()
        for order, made in BODIES.items():
            add = app.get if issubclass(made, NoBody) else app.post
            add(f"/v1/{order}", response_model=OrderAnswer, summary=made.__doc__)(
                self._route(order, made)
            )
        app.get("/v1/orders/{id}")(self._look)
        app.exception_handler(InputError)(_wrong)

    def _route(self, order: str, made: type[Any]) -> Callable[..., Coroutine[Any, Any, Response]]:
        async def ask() -> Response:
            try:
                parts = await self._act(order, {}, "")
            except TierloomError as error:
                return JSONResponse({"detail": f"{order}: {error}"}, 503)
            failed = any("error" in part for part in parts.values())
            return _answer(OrderAnswer("", order, "failed" if failed else "done", parts))

        async def give(
            body: Any,
            idempotency_key: Annotated[str, Header(max_length=200)] = "",
            deadline: Annotated[str, Header(max_length=40)] = "",
        ) -> Response:
            return await self._give(order, body, idempotency_key, deadline)

        give.__annotations__ |= {"body": made, "idempotency_key": _Key, "deadline": _Time}
        return ask if issubclass(made, NoBody) else give

    async def _give(self, order: str, body: Any, key: str, deadline: str) -> Response:
        id, said = key or secrets.token_hex(8), asdict(body)
        try:
            seconds = parse_seconds(deadline) if deadline else LONGEST
        except ValueError as error:
            raise InputError(f"Deadline: {error}") from None
        if not 0 < seconds <= LONGEST:
            raise InputError(f"Deadline {deadline!r}: {LONGEST:g} s at most")
        try:
            taken = await self._book.once(
                id, order, said, seconds, lambda: self._act(order, said, id)
            )
        except InputError:
            raise
        except TierloomError as error:
            return JSONResponse({"detail": f"{order}: {error}"}, 503)
        return _answer(OrderAnswer(id, order, taken.state, taken.parts, taken.detail))

    async def _look(self, id: str) -> OrderAnswer:
        """How far an order is, or what came of it within the last hour."""
        taken = self._book.find(id)
        if taken is None:
            raise InputError(f"order {id!r:.200}: this process has not taken it, or long ago")
        parts = taken.parts
        if taken.state == "running":
            parts = await self._act("progress", {"id": id}, "")
        return OrderAnswer(id, taken.order, taken.state, parts, taken.detail)


_Key = Annotated[str, Header(max_length=200)]
_Time = Annotated[str, Header(max_length=40)]


def _answer(answer: OrderAnswer) -> Response:
    return JSONResponse(asdict(answer), _STATUS[answer.state])


async def _wrong(_: object, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, 422)
