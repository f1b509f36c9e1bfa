"""The messages between a `server` tier and `tierloom serve`, as docs/protocol.md lays them out.

Every message is a head of 16 bytes and a body of fixed records, little-endian, parsed with `struct`
alone; the bytes of objects follow the messages that announce them. Nothing here does I/O, and no
function takes more memory than the body that it was given.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple, TypeVar

from tierloom.stages.errors import Lost, TierDown
from tierloom.stages.kv.object import LINK
from tierloom.stages.memory.allocator import PAGE

VERSION = 1
MAGIC = b"TW"
HEAD = struct.Struct("<2sBBIII")
"""Magic, version, kind, number, bytes of the body, zero."""

BODY = 256 << 10
"""Bytes of the longest body."""
FIRST = 1024
"""Bytes of the longest body before the WELCOME."""
KEYS = 4096
"""Most keys of one request."""
OBJECTS = 256
"""Most objects of one GET, PUT or BORROW."""

DONE, SEND, BYTES = 0, 255, 254
"""Codes of one object besides those of `Lost`: done; send its bytes; ask for its bytes."""
MEMORY, DIRECTORY, LANDS, OFFERS, TELLS_RANKS = 1, 2, 4, 8, 16
"""Flags of HELLO: the client can map memory; has memory that others may write into. Of WELCOME: the
server shares its own; hosts a directory; writes into the client's memory; takes OFFER; answers
RANKS."""
NONCE = 32


class BadMessage(TierDown):
    """The other side does not speak this protocol; the connection must be closed."""


class Kind(IntEnum):
    """Kinds of message; a server's are odd."""

    GREETING = 1
    HELLO = 2
    WELCOME = 3
    ERROR = 5
    HAS = 6
    HAD = 7
    GET = 8
    ITEM = 9
    PUT = 10
    GRANT = 11
    KEPT = 13
    DROP = 14
    CLEAR = 16
    STAT = 18
    HOLDS = 19
    PING = 20
    PONG = 21
    BORROW = 22
    LENT = 23
    RETURN = 24
    SETTLE = 26
    JOIN = 28
    TOLD = 29
    LEAVE = 30
    BEAT = 32
    ANNOUNCE = 34
    REPORT = 36
    SWEEP = 38
    FIND = 40
    FOUND = 41
    WORKERS = 42
    MEMBERS = 43
    TAKE = 44
    PIECE = 45
    AGENT = 46
    AGREED = 47
    LAND = 48
    LANDING = 49
    ABORT = 50
    LANDED = 51
    OFFER = 52
    OFFERED = 53
    RANKS = 60
    RANKED = 61


class ErrorCode(IntEnum):
    """Why a server ends a connection."""

    MALFORMED = 1
    VERSION = 2
    TOKEN = 3
    DRAINING = 4
    BROKEN = 5


class Message(NamedTuple):
    kind: Kind
    number: int
    """The number of the request, repeated in every reply to it."""
    body: bytes = b""


class Greeting(NamedTuple):
    """The first message, from the server."""

    oldest: int
    newest: int
    """Versions that it speaks."""
    guarded: bool
    """It requires a token."""
    epoch: bytes
    """16 bytes, new at each start of the server."""
    nonce: bytes


class Hello(NamedTuple):
    """The client's reply to the greeting."""

    version: int
    flags: int
    namespace: bytes
    nonce: bytes
    proof: bytes


class Welcome(NamedTuple):
    flags: int
    proof: bytes
    window: int
    """Bytes of objects in one PUT, unless it has but one."""
    largest: int
    """Bytes of an object, at most."""
    memory: int
    """Bytes to map, with MEMORY."""


class Wanted(NamedTuple):
    """An object of a GET: frames `first` to `upto`; the header too, where `first` is 0."""

    key: bytes
    first: int
    upto: int
    nbytes: int
    """Its expected length; 0: unknown."""


class Item(NamedTuple):
    """Bytes `begin` to `end` of an object follow; its frames up to `loaded` have then come."""

    code: int
    loaded: int
    nbytes: int
    begin: int
    end: int


class Loan(NamedTuple):
    """An object of a BORROW: where it is in the shared memory."""

    code: int
    id: int
    offset: int
    nbytes: int


class Holdings(NamedTuple):
    """What is kept of the client's namespace, the capacity, and how many objects of the whole
    store were evicted since it started."""

    done: int
    """Objects that were deleted, in reply to a DROP or CLEAR."""
    objects: int
    nbytes: int
    capacity: int
    evicted: int


class Offer(NamedTuple):
    """An object of a PUT."""

    key: bytes
    nbytes: int


_LAYOUTS = {
    Greeting: struct.Struct("<BB?5x16s32s"),
    Hello: struct.Struct("<BB6x32s32s32s"),
    Welcome: struct.Struct("<B7x32sQQQ"),
    Wanted: struct.Struct("<32sIIQ"),
    Offer: struct.Struct("<32sQ"),
    Item: struct.Struct("<B3xIQQQ"),
    Loan: struct.Struct("<B7xQQQ"),
    Holdings: struct.Struct("<QQQQQ"),
}
_ERROR = struct.Struct("<H")
_ID = struct.Struct("<Q")
WELCOME_BYTES = HEAD.size + _LAYOUTS[Welcome].size
R = TypeVar("R", Greeting, Hello, Welcome, Wanted, Offer, Item, Loan, Holdings)


def pack(*records: R) -> bytes:
    """Records of one type, one after another."""
    return b"".join([_LAYOUTS[type(record)].pack(*record) for record in records])


def unpack(kind: type[R], body: bytes) -> R:
    """The one record that a body is. Raises BadMessage."""
    (record,) = unpack_all(kind, body, 1, least=1)
    return record


def unpack_all(kind: type[R], body: bytes, most: int, *, least: int = 0) -> list[R]:
    """The records that a body is. Raises BadMessage."""
    layout = _LAYOUTS[kind]
    count = _count(body, layout.size, most)
    if count < least:
        raise BadMessage(f"body of {len(body)} bytes, not {least} records of {layout.size}")
    return [kind(*fields) for fields in layout.iter_unpack(body)]


def message(kind: Kind, number: int, body: bytes = b"") -> bytes:
    return HEAD.pack(MAGIC, VERSION, kind, number, len(body), 0) + body


def head(raw: bytes | memoryview, limit: int = BODY) -> tuple[Kind, int, int]:
    """Kind, number and length of the body, from the first 16 bytes. Raises BadMessage."""
    magic, version, kind, number, length, zero = HEAD.unpack(raw)
    if magic != MAGIC or zero:
        raise BadMessage("not a tierloom message (bad magic)")
    if version != VERSION:
        raise BadMessage(f"message of protocol version {version}, expected {VERSION}")
    if length > limit:
        raise BadMessage(f"message of {length} bytes; at most {limit} are allowed")
    try:
        return Kind(kind), number, length
    except ValueError:
        raise BadMessage(f"message of unknown kind {kind}") from None


def proof(token: bytes, side: bytes, *said: bytes) -> bytes:
    """Proves that `side` knows the token, for this handshake only; the token is never sent."""
    return hmac.digest(token, b"tierloom 1 " + side + b"".join(said), "sha256")


def keys_of(body: bytes, most: int = KEYS) -> list[bytes]:
    return [body[i * LINK : (i + 1) * LINK] for i in range(_count(body, LINK, most))]


def item_of(body: bytes, asked: Wanted, largest: int) -> Item:
    """The announcement of an object's bytes, checked against the request. Raises BadMessage."""
    item = unpack(Item, body)
    if item.code not in _CODES:
        raise BadMessage(f"object with unknown code {item.code}")
    if item.code:
        return item
    whole = PAGE <= item.nbytes <= largest and not item.nbytes % PAGE
    ordered = (0 if asked.first else PAGE) <= item.end - item.begin <= item.nbytes - item.begin
    if not whole or not ordered or not asked.first <= item.loaded <= asked.upto:
        raise BadMessage("lengths of an object contradict each other")
    if not asked.first and item.begin:
        raise BadMessage("an object came without its header")
    return item


def codes_of(body: bytes, count: int, also: int = DONE) -> list[int]:
    """One code per object. `also`: another that may be among them."""
    if len(body) != count or not _CODES.issuperset(set(body) - {also}):
        raise BadMessage(f"{len(body)} codes of {count} objects, or unknown ones")
    return list(body)


def loans_of(body: bytes, count: int, memory: int) -> list[Loan]:
    """Loans that lie inside `memory` bytes. Raises BadMessage."""
    loans = unpack_all(Loan, body, count, least=count)
    for loan in loans:
        if loan.code not in _CODES and loan.code != BYTES:
            raise BadMessage(f"loan with unknown code {loan.code}")
        inside = PAGE <= loan.nbytes <= memory and loan.offset <= memory - loan.nbytes
        if not loan.code and (not inside or loan.offset % PAGE or loan.nbytes % PAGE):
            raise BadMessage("a loan outside the shared memory")
    return loans


def pack_ids(ids: Sequence[int]) -> bytes:
    return b"".join([_ID.pack(i) for i in ids])


def ids_of(body: bytes) -> list[int]:
    _count(body, _ID.size, KEYS)
    return [i for (i,) in _ID.iter_unpack(body)]


def kept_of(body: bytes, count: int) -> tuple[list[int], Holdings]:
    """Reply to a PUT: codes, then holdings."""
    return codes_of(body[:count], count), unpack(Holdings, body[count:])


def pack_error(why: ErrorCode, text: str) -> bytes:
    return _ERROR.pack(why) + text.encode()[:500]


def error_of(body: bytes) -> tuple[int, str]:
    if len(body) < _ERROR.size:
        raise BadMessage("an ERROR without a code")
    text = body[_ERROR.size : FIRST].decode(errors="replace")
    return _ERROR.unpack_from(body)[0], "".join(c if c.isprintable() else "?" for c in text)


_CODES = frozenset([DONE, *Lost])


def _count(body: bytes, size: int, most: int) -> int:
    """Records of `size` bytes in a body. Raises BadMessage."""
    count, rest = divmod(len(body), size)
    if rest or count > most:
        raise BadMessage(f"body of {len(body)} bytes is not up to {most} records of {size}")
    return count
