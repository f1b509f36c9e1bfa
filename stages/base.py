"""Stages as tierloom 0.1 had them, for one release: use `RequestStage` or `BatchStage` of
`tierloom.stages.contract.stage`, whose methods are plain or `async def`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from enum import Enum
from typing import Any, ClassVar

from tierloom.stages.contract.batch import Batch
from tierloom.stages.contract.request import Request
from tierloom.stages.contract.stage import BatchStage, ChunkOptions, Context, PortType, RequestStage

__all__ = ["ChunkOptions", "Context", "Lane", "LoopStage", "PortType", "Stage"]

warnings.warn(
    "tierloom.stages.base will go: stages are RequestStage and BatchStage of "
    "tierloom.stages.contract.stage",
    DeprecationWarning,
    stacklevel=2,
)


class Lane(Enum):
    """No longer read: `async def` says that the loop runs a method."""

    ENGINE = "engine"
    LOOP = "loop"
    POOL = "pool"


class Stage(RequestStage, BatchStage):
    """Both kinds in one, as `gives` says."""

    lane: ClassVar[Lane]

    @classmethod
    def work(cls) -> Callable[..., Any]:
        return cls.plan if cls.gives in _PLANS else cls.apply

    def plan(self, request: Request) -> Any:
        raise NotImplementedError

    def apply(self, batch: Batch) -> Any:
        raise NotImplementedError


class LoopStage(Stage):
    lane = Lane.LOOP

    async def plan(self, request: Request) -> None:
        await self.plan_async(request)

    async def apply(self, batch: Batch) -> None:
        await self.apply_async(batch)

    async def plan_async(self, ticket: Request) -> None:
        raise NotImplementedError

    async def apply_async(self, batch: Batch) -> Any:
        raise NotImplementedError


_PLANS = ("keys@host/request", "plan@host/request")
