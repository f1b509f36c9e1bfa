"""What all requests of a proxy share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tierloom.adapters.proxy.counters import ProxyCounters
from tierloom.adapters.proxy.fleet import EngineSeat, Fleet
from tierloom.adapters.proxy.lmcache_side import LmcacheSide

Way = Literal["auto", "after", "together"]


@dataclass(kw_only=True)
class ProxyParts:
    """Engines, counters and options. Times in seconds."""

    fleet: Fleet = field(default_factory=Fleet)
    counters: ProxyCounters = field(default_factory=ProxyCounters)
    way: Way = "auto"
    local_under: int = 512
    """Tokens to compute below which a decoder does it."""
    lmcache: LmcacheSide | None = None
    """Engines hand over as LMCache's do; None: as NIXL's connector has it."""
    body_wait: float = 30.0
    """How long the next byte of a body may take."""
    prefill_wait: float = 120.0
    answer_wait: float = 600.0
    """How long the first byte of an answer may take."""
    probe: float = 1.0
    token: bytes = b""
    """Of who changes the engines; empty: anybody who reaches the proxy may."""
    responses: dict[str, EngineSeat] = field(default_factory=dict)
    """Which decoder has the stored response of an id: the latest."""
