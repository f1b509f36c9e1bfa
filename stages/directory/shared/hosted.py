"""A directory that another process hosts: `tierloom serve --directory embedded`, or an engine.

Spoken over the serve protocol (docs/protocol.md), after a handshake as any client makes it. Both
sides are here: `HostedDirectory` asks, `DirectoryHost` answers.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from tierloom.stages.directory.shared.contract import Directory, Member, answered_within, name_taken
from tierloom.stages.directory.shared.records import (
    MOST_HOLDERS,
    MOST_NAMES,
    NAME,
    WORD,
    ChunkHolder,
    WorkerRecord,
    holders_in,
    number_of,
    require_changes,
    require_names,
    word_of,
)
from tierloom.stages.errors import ConfigError, InputError, TierDown
from tierloom.stages.kv.object import LINK
from tierloom.stages.tiers.net.address import Address
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.client import PORT, Client, refuse
from tierloom.stages.tiers.server.protocol import BadMessage, Kind

ANSWERS = {
    Kind.JOIN: Kind.TOLD, Kind.LEAVE: Kind.TOLD, Kind.BEAT: Kind.TOLD, Kind.ANNOUNCE: Kind.TOLD,
    Kind.REPORT: Kind.TOLD, Kind.SWEEP: Kind.TOLD, Kind.FIND: Kind.FOUND,
    Kind.WORKERS: Kind.MEMBERS,
}  # fmt: skip
"""Questions, and the kind of their answers."""
_NOBODY = bytes(LINK)  # the namespace of who asks for no object
_U64, _PAIR, _U32 = struct.Struct("<Q"), struct.Struct("<QQ"), struct.Struct("<I")
_RUN = struct.Struct("<HH")  # chunks, and bytes of the words that all of them have
_MEMBER = struct.Struct("<QI")  # epoch, and bytes of the record
_PAGE = 192 << 10  # bytes of workers in one answer, about
_CONNECTIONS = 2


class HostedDirectory(Directory):
    """For asyncio."""

    def __init__(
        self, url: str, *, timeout: float = 1.0, token_file: str = "", ca_file: str = ""
    ) -> None:
        """`url`: `directory://HOST:PORT`, `directory+tls://HOST:PORT` or `directory+unix:///PATH`.
        `timeout`: seconds after which a call raises TierDown. Raises ConfigError."""
        try:
            at = Address.parse(
                url, "directory", tls="directory+tls", unix="directory+unix", port=PORT
            )
        except ValueError as error:
            raise ConfigError(f"directory: {error}") from None
        self._at, self._timeout, self._number = at, timeout, 0
        self._client = Client(at, _NOBODY, lambda: None, share=False)
        self._client.prepare(token_file, ca_file, _CONNECTIONS)

    async def close(self) -> None:
        self._client.close()

    async def join(self, worker: WorkerRecord, *, first: int = 0, last: int = 0) -> int:
        epoch = await self._tell(Kind.JOIN, _PAIR.pack(first, last) + worker.pack())
        if not epoch:
            raise name_taken(worker)
        return epoch

    async def leave(self, epoch: int) -> None:
        await self._tell(Kind.LEAVE, _U64.pack(epoch))

    async def beat(self, epoch: int, sequence: int) -> bool:
        return bool(await self._tell(Kind.BEAT, _PAIR.pack(epoch, sequence)))

    async def announce(self, epoch: int, sequence: int, changes: bytes) -> bool:
        require_changes(changes)
        return bool(await self._tell(Kind.ANNOUNCE, _PAIR.pack(epoch, sequence) + changes))

    async def find(self, names: Sequence[bytes]) -> list[tuple[ChunkHolder, ...]]:
        require_names(names)
        if not names:
            return []
        with answered_within(self._timeout, f"the directory at {self._at}"):
            return _found_in(await self._ask(Kind.FIND, b"".join(names)), len(names))

    async def report(self, name: bytes, holder: ChunkHolder) -> None:
        require_names([name])
        await self._tell(Kind.REPORT, name + word_of(*holder))

    async def workers(self, numbers: Sequence[int] = ()) -> dict[int, Member]:
        wanted = b"".join([_U32.pack(n) for n in numbers])
        members, begin = dict[int, Member](), 0
        with answered_within(self._timeout, f"the directory at {self._at}"):
            while True:
                body = await self._ask(Kind.WORKERS, _U32.pack(begin) + wanted)
                following, some = _members_in(body)
                members |= some
                if not following:
                    return members
                if following <= begin:
                    raise BadMessage("workers that come twice")
                begin = following

    async def sweep(self, most: int = 2000) -> int:
        return await self._tell(Kind.SWEEP, _U32.pack(most))

    async def _tell(self, kind: Kind, body: bytes) -> int:
        with answered_within(self._timeout, f"the directory at {self._at}"):
            return int(_unpacked(_U64, await self._ask(kind, body))[0])

    async def _ask(self, kind: Kind, body: bytes) -> bytes:
        async with self._client.connection() as connection:
            if not self._client.welcome.flags & wire.DIRECTORY:
                raise TierDown(
                    f"{self._at} hosts no directory: use `serve: {{directory: embedded}}` in that "
                    "engine's file, or `tierloom serve --directory embedded`, of this release"
                )
            self._number = number = (self._number + 1) & 0xFFFFFFFF
            await connection.send(wire.message(kind, number, body))
            message = await connection.message()
            refuse(message, ANSWERS[kind])
            if message.number != number:
                raise BadMessage("a reply to another request")
            return message.body


class DirectoryHost:
    """A directory of this process, asked by clients. On the directory's loop."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    async def answer(self, message: wire.Message) -> bytes | None:
        """The message to send; None: it is no question about chunks. Raises BadMessage."""
        kind, number, body = message
        if kind not in ANSWERS:
            return None
        try:
            if kind is Kind.FIND:
                names = [body[i : i + NAME] for i in range(0, len(body), NAME)]
                told = _pack_found(await self._directory.find(names))
            elif kind is Kind.WORKERS:
                told = await _pack_members(self._directory, body)
            else:
                told = _U64.pack(await _done(self._directory, kind, body))
        except (InputError, struct.error) as error:
            raise BadMessage(f"{kind.name}: {error}") from None
        return wire.message(ANSWERS[kind], number, told)


async def _done(directory: Directory, kind: Kind, body: bytes) -> int:
    if kind is Kind.SWEEP:
        return await directory.sweep(min(MOST_NAMES * 10, _unpacked(_U32, body)[0]))
    if kind is Kind.REPORT:
        holders = holders_in(body[NAME:])
        if len(body) != NAME + WORD:
            raise BadMessage(f"REPORT of {len(body)} bytes")
        await directory.report(body[:NAME], holders[0])
        return 1
    if kind is Kind.LEAVE:
        await directory.leave(_unpacked(_U64, body)[0])
        return 1
    if kind is Kind.BEAT:
        return await directory.beat(*_unpacked(_PAIR, body))
    one, other = _unpacked(_PAIR, body[: _PAIR.size])
    rest = body[_PAIR.size :]
    if kind is Kind.ANNOUNCE:
        return await directory.announce(one, other, rest)
    try:
        return await directory.join(WorkerRecord.unpack(rest), first=one, last=other)
    except ConfigError:
        return 0


def _unpacked(form: struct.Struct, body: bytes) -> tuple[int, ...]:
    if len(body) != form.size:
        raise BadMessage(f"body of {len(body)} bytes, not {form.size}")
    return form.unpack(body)


def _pack_found(found: Sequence[tuple[ChunkHolder, ...]]) -> bytes:
    runs = list[tuple[tuple[ChunkHolder, ...], list[int]]]()
    for holders in found:
        if not runs or holders is not runs[-1][0]:
            runs.append((holders, [0]))
        runs[-1][1][0] += 1
    parts = list[bytes]()
    for holders, (chunks,) in runs:
        words = b"".join([word_of(*holder) for holder in holders])
        parts.append(_RUN.pack(chunks, len(words)) + words)
    return b"".join(parts)


def _found_in(body: bytes, most: int) -> list[tuple[ChunkHolder, ...]]:
    found: list[tuple[ChunkHolder, ...]] = []
    at = 0
    while at < len(body):
        chunks, size = _unpacked(_RUN, body[at : at + _RUN.size])
        words = body[at + _RUN.size : at + _RUN.size + size]
        at += _RUN.size + size
        whole = len(words) == size and size % WORD == 0 and 0 < size <= WORD * MOST_HOLDERS
        if not whole or not 0 < chunks <= most - len(found):
            raise BadMessage(f"a search for {most} chunks found what cannot be")
        found += [holders_in(words)] * chunks
    return found


async def _pack_members(directory: Directory, body: bytes) -> bytes:
    """Those from a number on that fit, and the number to go on from."""
    asked = [n for (n,) in _U32.iter_unpack(body)]
    begin, numbers = asked[0] if asked else 0, asked[1:]
    members = sorted((await directory.workers(numbers)).items())
    parts, size = list[bytes](), 0
    for number, member in members:
        if number < begin:
            continue
        if size > _PAGE:
            return _U32.pack(number) + b"".join(parts)
        record = member.record.pack()
        parts.append(_MEMBER.pack(member.epoch, len(record)) + record)
        size += len(parts[-1])
    return _U32.pack(0) + b"".join(parts)


def _members_in(body: bytes) -> tuple[int, dict[int, Member]]:
    """The number to go on from, 0 for none, and workers; of a later version's, none."""
    (following,) = _unpacked(_U32, body[: _U32.size])
    members, at = dict[int, Member](), _U32.size
    while at < len(body):
        epoch, size = _unpacked(_MEMBER, body[at : at + _MEMBER.size])
        raw = body[at + _MEMBER.size : at + _MEMBER.size + size]
        at += _MEMBER.size + size
        try:
            members[number_of(epoch)] = Member(epoch, WorkerRecord.unpack(raw))
        except InputError:
            continue
    return following, members
