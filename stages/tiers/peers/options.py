"""Options of the tier `peer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from tierloom.stages.options import Seconds, Size
from tierloom.stages.tiers.landing.options import PeerWire, WireOptions
from tierloom.stages.tiers.server.client import address_of


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerOptions:
    """Options of a tier that reads what other engines keep."""

    directory: list[str]
    """Engines that serve: `HOST:PORT`, or a URL as a `server` tier takes it; one may be several,
    with commas between. This engine itself may be among them. Or one directory that engines tell
    what they serve: `redis://HOST:PORT/DB`, or `directory://HOST:PORT` of who hosts one; see
    `serve.directory`."""
    token_file: str = ""
    """File with the token they ask for, and who hosts the directory. Default: the environment
    variable TIERLOOM_TOKEN, if set."""
    ca_file: str = ""
    """PEM file of the certificate authorities to trust. Default: the system's."""
    connections: int = 4
    """Most calls to one engine at once, each on a connection of its own; one is for questions."""
    timeout: Seconds = 0.4
    """Longest wait for one answer of one engine, objects included. It is then left alone."""
    hedge: Seconds | None = 0.03
    """Ask the next engine as well, when one is late by this much."""
    borrow: Size = 0
    """Most bytes of what memory evicts here to put into idle memory of engines that say
    `serve: {lend: ...}`; it is found there again. 0: nothing."""
    probe: Seconds = 0.5
    """How often an engine that is left alone is asked, in the background, whether it is back."""
    wire: PeerWire = "inline"
    """How objects come: `inline` in the connection, by `nixl` into memory that engines write to;
    `auto`: by NIXL where both engines have it, the connection is not encrypted, and the object is
    not shorter than `nixl.min_bytes`. An engine that has no NIXL sends inline. No token guards
    NIXL's own ports: for networks that are trusted."""
    landing: Size = 1 << 30
    """Memory for objects that are on their way by NIXL; pages are taken as they are used."""
    nixl: WireOptions = field(default_factory=WireOptions)
    """NIXL's backend; both sides need the same."""

    def __post_init__(self) -> None:
        if not self.addresses:
            raise ValueError("directory: name at least one engine")
        if self.looks_up and len(self.directory) > 1:
            raise ValueError("directory: name one directory, or engines")
        if "embedded" in self.directory:
            raise ValueError("directory: name who hosts it, as in directory://127.0.0.1:7655")
        for address in () if self.looks_up else self.addresses:
            address_of(url_of(address))
        if self.connections < 2 or self.timeout <= 0 or self.probe <= 0:
            raise ValueError("connections must be at least 2, timeout and probe positive")
        if self.wire not in get_args(PeerWire):
            raise ValueError(f"wire is {self.wire!r}; known: {', '.join(get_args(PeerWire))}")
        if self.landing < 1 << 20:
            raise ValueError("landing must be at least 1 MiB")

    @property
    def addresses(self) -> list[str]:
        """One by one, each once."""
        words = (word.strip() for entry in self.directory for word in entry.split(","))
        return list(dict.fromkeys(word for word in words if word))

    @property
    def looks_up(self) -> bool:
        """It names a directory; sentinels of one have commas between them."""
        scheme, url, _ = "".join(self.directory[:1]).strip().partition("://")
        return bool(url) and scheme.startswith(("redis", "directory"))


def url_of(address: str) -> str:
    """As a `server` tier takes it."""
    return address if "://" in address else f"tierloom://{address}"
