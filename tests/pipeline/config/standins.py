"""Stages and tiers that only have contracts: what the checker may look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tierloom.stages.contract.batch import Batch
from tierloom.stages.contract.request import Request
from tierloom.stages.contract.stage import BatchStage, RequestStage
from tierloom.stages.options import NoOptions, Seconds, Size
from tierloom.stages.tiers.contract.tier import Tier


@dataclass(frozen=True, kw_only=True, slots=True)
class SortsOptions:
    """One option of every type."""

    must: int
    """This one has no default."""
    number: float = 1.0
    """A number."""
    word: str = "a"
    """Text."""
    flag: bool = False
    """A flag."""
    mode: Literal["fast", "small"] = "fast"
    """A choice."""
    size: Size = 0
    """A size."""
    direct: bool | Literal["auto"] = "auto"
    """Two types."""
    wait: Seconds | None = None
    """A time, or none."""
    names: list[str] | None = None
    """A list."""

    def __post_init__(self) -> None:
        if self.must > 9:
            raise ValueError(f"must may be 9 at most, got {self.must}")


class Sorts(RequestStage):
    Options = SortsOptions
    takes = "keys@host/request"
    gives = "same"

    def plan(self, request: Request) -> None: ...


class ToRemote(BatchStage):
    """Wants what only a device can give."""

    Options = NoOptions
    takes = "bytes@device/frame"
    gives = "receipt@host/request"

    def apply(self, batch: Batch) -> None: ...


class WrongKind(BatchStage):
    """Gives what only a stage of requests can."""

    Options = NoOptions
    takes = "keys@host/request"
    gives = "keys@host/request"

    def apply(self, batch: Batch) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class BoxOptions:
    """A tier."""

    capacity: Size = 0
    """Bytes kept."""


class Box(Tier):
    Options = BoxOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteOptions:
    """A tier that is reached over a network."""

    url: str
    """Where."""
    ttl: Seconds = 0.0
    """How long."""
    password: str = ""
    """A secret."""
    password_env: str = ""
    """Where a secret is."""
    params: dict[str, str] | None = None
    """More of them."""


class Remote(Tier):
    Options = RemoteOptions


class ArenaBox(Box):
    in_arena = True


NO_STAGE = 5
