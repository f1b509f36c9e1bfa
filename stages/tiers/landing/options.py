"""What may be said of NIXL where engines move objects by it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tierloom.stages.errors import MissingPackage
from tierloom.stages.options import Size
from tierloom.stages.tiers.nixl.installed import has_nixl

PeerWire = Literal["inline", "nixl", "auto"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WireOptions:
    """NIXL, by which engines write into each other's memory."""

    backend: str = "UCX"
    """NIXL's plugin; both sides need the same."""
    options: dict[str, str] = field(default_factory=dict)
    """What the plugin is told. UCX is told more by the environment, as in UCX_TLS and
    UCX_NET_DEVICES."""
    min_bytes: Size = 1 << 20
    """With `wire: auto`, objects shorter than this come in the connection, as all do by
    `inline`."""


def use_nixl(wire: PeerWire) -> bool:
    """Whether this process moves objects by NIXL. Raises MissingPackage where it must and
    cannot."""
    if wire == "inline" or has_nixl():
        return wire != "inline"
    if wire == "nixl":
        raise MissingPackage("nixl, which wire: nixl needs,", "nixl", "; or set wire: auto")
    return False
