"""What workers tell a directory: who they are, what chunks are called, and which they hold where.

A holder is a *word* of 3 bytes: 20 bits of the worker's number, then a bit for each of its tiers
that has the chunk. What is known of a chunk is the words of its holders, one after another.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from tierloom.stages.errors import InputError
from tierloom.stages.kv.object import LINK, name_of

NAME = 16
"""Bytes of a chunk's name."""
WORD = 3
NUMBERS = 1 << 20
MOST_TIERS = 4
MOST_HOLDERS = 64
"""Holders of one chunk that a directory keeps: one more replaces the oldest."""
MOST_NAMES = 1024
"""Chunks of one call."""
_TAG = 20  # bits of an epoch that are its process's
_RECORD = 8192  # most bytes of a worker's record
CHANGE = NAME + 1
"""Bytes of a change: name and tiers."""
_TIERS = [bytes([tiers]) for tiers in range(256)]


def chunk_name(namespace: bytes, key: bytes) -> bytes:
    """What a directory calls a chunk: 16 bytes of the digest that `serve` names objects by."""
    if len(key) != LINK or len(namespace) != LINK:
        raise InputError(f"a key of {len(key)} and a namespace of {len(namespace)} bytes, not 32")
    return name_of(namespace, key)[:NAME]


def epoch_of(turn: int, worker: WorkerRecord) -> int:
    """The epoch of a worker that joins as the `turn`-th. Of the process as well: a directory that
    has lost its count must not take one worker for another."""
    return turn << _TAG | zlib.crc32((worker.name + worker.process).encode()) & (1 << _TAG) - 1


def turn_of(epoch: int) -> int:
    return epoch >> _TAG


def number_of(epoch: int) -> int:
    """A worker's number, from the epoch that `join` gave it."""
    return turn_of(epoch) % NUMBERS


class ChunkHolder(NamedTuple):
    """A worker that has a chunk."""

    number: int
    tiers: int
    """Bit i: tier i of its record has it."""


def word_of(number: int, tiers: int) -> bytes:
    return (number << MOST_TIERS | tiers).to_bytes(WORD, "big")


def holders_in(words: bytes) -> tuple[ChunkHolder, ...]:
    """The holders that words name; bytes that make no word are passed over."""
    whole = range(0, len(words) - WORD + 1, WORD)
    numbers = (int.from_bytes(words[i : i + WORD], "big") for i in whole)
    return tuple(ChunkHolder(n >> MOST_TIERS, n & (1 << MOST_TIERS) - 1) for n in numbers)


def pack_changes(changes: Iterable[tuple[bytes, int]]) -> bytes:
    """What a worker holds of chunks from now on: name, and bit i where tier i of its record has the
    chunk; 0: none has."""
    return b"".join([name + _TIERS[tiers] for name, tiers in changes])


def require_names(names: Sequence[bytes], most: int = MOST_NAMES) -> None:
    """Raise InputError unless these are at most so many names of chunks."""
    if len(names) > most:
        raise InputError(f"{len(names)} chunks in one call: {most} at most")
    if not set(map(len, names)) <= {NAME}:
        i, name = next((i, n) for i, n in enumerate(names) if len(n) != NAME)
        raise InputError(f"name {i} of a chunk has {len(name)} bytes, not {NAME}")


def require_changes(raw: bytes) -> None:
    """Raise InputError unless these can be announced in one call."""
    if len(raw) % CHANGE or len(raw) > MOST_NAMES * CHANGE:
        raise InputError(f"changes of {len(raw)} bytes: {MOST_NAMES} of {CHANGE} at most")
    if max(raw[NAME::CHANGE], default=0) >> MOST_TIERS:
        raise InputError(f"changes of tiers that no worker has: {MOST_TIERS} at most")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerRecord:
    """A worker, as others see it. Raises InputError for what no worker can be."""

    instance: str
    """The engine's name; no two engines have the same."""
    process: str
    """32 hex digits, drawn anew by each process: its listeners greet with them."""
    rank: int = 0
    share: str = ""
    """Which layers and heads of the model it has; empty: all."""
    model: str = ""
    namespace: str = ""
    """Hex digits of its namespace's digest."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """What the namespace is made of, for people and routers."""
    chunk: int = 256
    grain: int = 32
    keys: str = "own"
    tiers: tuple[str, ...] = ()
    """Tiers that are announced, best first; the order of the bits."""
    addresses: tuple[str, ...] = ()
    """Where its tiers are served."""
    heartbeat: float = 2.0
    """Seconds; a worker from which nothing came for two of them is dead."""

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            if not isinstance(getattr(self, name), kind):
                raise InputError(f"worker's {name}: {getattr(self, name)!r:.80}")
        texts = (*self.tiers, *self.addresses, *self.fields, *self.fields.values())
        problem = ""
        if not self.instance or not self.instance.isprintable() or len(self.instance) > 200:
            problem = f"instance {self.instance!r:.80}: 1 to 200 printable characters"
        elif not self.share.isprintable() or len(self.share) > 200:
            problem = f"share {self.share!r:.80}: at most 200 printable characters"
        elif len(self.process) != 32 or not set(self.process) <= set("0123456789abcdef"):
            problem = f"process {self.process!r:.80}: 32 hex digits"
        elif len(self.tiers) > MOST_TIERS:
            problem = f"tiers: {len(self.tiers)}, {MOST_TIERS} at most"
        elif not all(isinstance(text, str) for text in texts):
            problem = "tiers, addresses and fields: all must be text"
        elif self.rank < 0 or not 0 < self.grain <= self.chunk or self.chunk % self.grain:
            problem = f"rank {self.rank}, chunk {self.chunk}, grain {self.grain}"
        elif not 0.05 <= self.heartbeat <= 600:
            problem = f"heartbeat {self.heartbeat} s: 50 ms to 10 min"
        if problem:
            raise InputError(f"worker's {problem}")

    @property
    def name(self) -> str:
        """What no two living workers share."""
        return f"{self.instance}/{self.rank}" + (f"/{self.share}" if self.share else "")

    def pack(self) -> bytes:
        """As JSON. Raises InputError where it is too long."""
        raw = json.dumps(asdict(self), separators=(",", ":")).encode()
        if len(raw) > _RECORD:
            raise InputError(f"worker's record has {len(raw)} bytes: {_RECORD} at most")
        return raw

    @classmethod
    def unpack(cls, raw: bytes) -> WorkerRecord:
        """Fields that a later version added are passed over. Raises InputError."""
        try:
            said = json.loads(raw) if len(raw) <= _RECORD else None
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise InputError("a worker's record that is not one")
        known: dict[str, Any] = {f.name: said[f.name] for f in fields(cls) if f.name in said}
        for name in ("tiers", "addresses"):
            if isinstance(known.get(name), list):
                known[name] = tuple(known[name])
        try:
            return cls(**known)
        except TypeError as error:
            raise InputError(f"a worker's record without all of it: {error}") from None


_KINDS: dict[str, Any] = {
    "instance": str, "process": str, "rank": int, "share": str, "model": str, "namespace": str,
    "fields": Mapping, "chunk": int, "grain": int, "keys": str, "tiers": tuple, "addresses": tuple,
    "heartbeat": int | float,
}  # fmt: skip
