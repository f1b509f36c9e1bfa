"""What can be ordered of one store or engine: the bodies of its orders, checked.

They are those of the door's routes, of `tierloom store`, and of `administer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from tierloom.stages.errors import InputError
from tierloom.stages.options import parse_seconds

MOST_CHUNKS = 1 << 16
"""Of one order."""
_STRICT = {"extra": "forbid"}
"""For the door: a name that is misspelled is refused, not passed over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClearBody:
    """Count the objects that fit all that is said, or delete them."""

    everything: bool = False
    """Whatever is kept; nothing of what chooses objects may be said then."""
    model: str = ""
    """Of this model."""
    namespace: str = ""
    """Of namespaces whose digest begins with these hex digits."""
    salt: str | None = None
    """Of the tenant with this salt, as far as it is known which objects are whose."""
    tags: dict[str, str] | None = None
    """With these tags; as `salt`."""
    older_than: str = ""
    """That this process has had for longer: `12 h`."""
    chunks: list[str] = field(default_factory=list)
    """With these keys, in hex digits."""
    tiers: list[str] = field(default_factory=list)
    """In these tiers alone; default: all whose index is in this process."""
    remote: bool = False
    """With all that is kept: also what this model has in tiers that others share."""
    pinned: bool = False
    """Also what is pinned."""
    dry_run: bool = True
    """Count them, and delete nothing."""
    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    def __post_init__(self) -> None:
        chooses = bool(self.model or self.namespace or self.older_than or self.chunks)
        chooses = chooses or self.salt is not None or self.tags is not None
        if chooses == self.everything:
            raise InputError(
                "clear: say either everything: true, or which: model, namespace, salt, tags, "
                "older_than, chunks"
            )
        if self.remote and not self.everything:
            raise InputError("clear: remote goes with everything: nobody knows what else is there")
        _seconds("older_than", self.older_than or "0")
        keys_in(self.chunks)
        if set(self.namespace) - set("0123456789abcdef"):
            raise InputError(f"namespace {self.namespace!r:.80}: hex digits in small letters")

    @property
    def age(self) -> float:
        """Seconds."""
        return _seconds("older_than", self.older_than or "0")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunksBody:
    """Which chunks: of a text, or by their keys."""

    tokens: list[int] = field(default_factory=list)
    """Token ids of a prompt: the longest prefix of it that is kept here."""
    salt: str = ""
    """The tenant's."""
    tags: dict[str, str] = field(default_factory=dict)
    """The tenant's, too."""
    chunks: list[str] = field(default_factory=list)
    """Keys, in hex digits."""
    namespace: str = ""
    """With `chunks` in `tierloom serve`, which keeps many: 64 hex digits of the one meant."""
    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    def __post_init__(self) -> None:
        if self.tokens and self.chunks:
            raise InputError("say tokens or chunks, not both")
        keys_in(self.chunks)
        if self.namespace:
            keys_in([self.namespace])


@dataclass(frozen=True, kw_only=True, slots=True)
class PinBody(ChunksBody):
    """Keep chunks from eviction in this process's own tiers, for a while."""

    owner: str
    """Who wants it; nobody else ends it."""
    ttl: str
    """For how long: `10 min`. Pinned again, the later end counts."""

    def __post_init__(self) -> None:
        ChunksBody.__post_init__(self)
        if not self.owner or len(self.owner) > 200 or not self.owner.isprintable():
            raise InputError(f"owner {self.owner!r:.80}: 1 to 200 printable characters")
        if not self.tokens and not self.chunks:
            raise InputError("pin: say tokens or chunks")
        if not 0 < _seconds("ttl", self.ttl) <= 366 * 86400:
            raise InputError(f"ttl {self.ttl!r}: more than nothing, and a year at most")

    @property
    def seconds(self) -> float:
        return _seconds("ttl", self.ttl)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnpinBody(ChunksBody):
    """End an owner's pins before their time: of these chunks, or all of them."""

    owner: str
    """Whose."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefetchBody(ChunksBody):
    """Bring chunks from colder tiers into memory: of a prompt all that is found, whoever has it."""

    def __post_init__(self) -> None:
        ChunksBody.__post_init__(self)
        if not self.tokens and not self.chunks:
            raise InputError("prefetch: say tokens or chunks")


@dataclass(frozen=True, kw_only=True, slots=True)
class FreezeBody:
    """Put nothing more into tiers, and serve what they have; or do so again."""

    on: bool = True
    tiers: list[str] = field(default_factory=list)
    """Default: all."""
    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT


@dataclass(frozen=True, kw_only=True, slots=True)
class BypassBody:
    """Neither read nor put into tiers, as if they were down; or do so again."""

    tiers: list[str]
    """By name."""
    on: bool = True
    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT


@dataclass(frozen=True, kw_only=True, slots=True)
class DrainBody:
    """Take nothing new, serve what is there, and let `/readyz` say so; or end that."""

    on: bool = True
    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT


@dataclass(frozen=True, kw_only=True, slots=True)
class LogLevelBody:
    """How much the process logs."""

    level: str
    """debug, info, warning or error."""
    logger: str = "tierloom"
    """A part of it: `tierloom.serve`."""
    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    def __post_init__(self) -> None:
        if self.level not in ("debug", "info", "warning", "error"):
            raise InputError(f"level {self.level!r:.80}: debug, info, warning or error")
        if self.logger.partition(".")[0] != "tierloom" or self.logger == "tierloom.admin":
            raise InputError(
                f"logger {self.logger!r:.80}: tierloom, or a part of it; orders are always logged"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressBody:
    """How far an order is."""

    id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NoBody:
    """Of orders that only ask."""


class UsageBody(NoBody):
    """Show what is kept of whom, and what is pinned, frozen and bypassed."""


class PinsBody(NoBody):
    """Show who has pinned how many objects, and for how long."""


BODIES: dict[str, type[Any]] = {
    "clear": ClearBody, "pin": PinBody, "unpin": UnpinBody, "freeze": FreezeBody,
    "bypass": BypassBody, "drain": DrainBody, "log-level": LogLevelBody, "usage": UsageBody,
    "pins": PinsBody, "prefetch": PrefetchBody,
}  # fmt: skip
"""Orders by name; usage and pins ask."""

SENT = ("clear", "pin", "unpin", "prefetch", "freeze", "bypass", "drain")
"""Those that a controller passes on."""


def body_of(order: str, said: Mapping[str, Any]) -> Any:
    """The body of an order, from plain values. Raises InputError."""
    made = BODIES.get(order) if order != "progress" else ProgressBody
    if made is None:
        raise InputError(f"order {order!r}: known: {', '.join(BODIES)}")
    known = {f.name for f in fields(made)}
    if unknown := [name for name in said if name not in known]:
        raise InputError(f"{order} has no {unknown[0]!r}; known: {', '.join(sorted(known))}")
    try:
        return made(**said)
    except TypeError as error:
        raise InputError(f"{order}: {error}") from None


def keys_in(chunks: list[str]) -> list[bytes]:
    """Keys of 32 bytes. Raises InputError."""
    if len(chunks) > MOST_CHUNKS:
        raise InputError(f"{len(chunks)} chunks in one order: {MOST_CHUNKS} at most")
    try:
        keys = [bytes.fromhex(chunk) for chunk in chunks]
    except ValueError:
        keys = [b""]
    if wrong := [i for i, key in enumerate(keys) if len(key) != 32]:
        raise InputError(f"chunk {wrong[0]}: a key has 64 hex digits")
    return keys


def _seconds(name: str, text: str) -> float:
    try:
        return parse_seconds(text)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
