"""FleetView: who of all engines has what, as a directory says. It keeps nothing of its own."""

from __future__ import annotations

import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import anyio

from tierloom.adapters.controller.control_bodies import InstanceHit, LookupAnswer, LookupBody
from tierloom.adapters.controller.text_tokens import TextTokens
from tierloom.pipeline.admin.admin_bodies import keys_in
from tierloom.stages.directory.shared.contract import Directory, Member
from tierloom.stages.directory.shared.described import seed_of, token_bytes_of
from tierloom.stages.directory.shared.records import MOST_NAMES, WorkerRecord, chunk_name
from tierloom.stages.errors import InputError
from tierloom.stages.kv.object import LINK
from tierloom.stages.kv.prefix import chunk_keys

_KEEP = 1.0
"""Seconds for which it is not asked again who lives."""
Members = dict[int, Member]


class FleetView:
    """On one loop. Everything raises TierDown where the directory does not answer."""

    def __init__(
        self, directory: Directory, texts: TextTokens, *, keep: float = _KEEP,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`clock`: monotonic, in seconds."""
        self.directory, self._texts = directory, texts
        self._keep, self._clock = keep, clock
        self._members, self._until = Members(), 0.0
        self._asking = anyio.Lock()

    async def members(self, *, now: bool = False) -> Members:
        """Living workers by number. `now`: whatever was known before."""
        async with self._asking:
            if now or self._clock() >= self._until:
                self._members = await self.directory.workers()
                self._until = self._clock() + self._keep
            return self._members

    async def instances(self) -> dict[str, list[WorkerRecord]]:
        """Records of each engine's workers."""
        found: dict[str, list[WorkerRecord]] = {}
        for _, member in sorted((await self.members()).items()):
            found.setdefault(member.record.instance, []).append(member.record)
        return found

    def tokens_of(self, body: LookupBody) -> array[int]:
        """Raises InputError."""
        tokens = self._texts.tokens(body.model, body.text) if body.text else body.tokens
        try:
            return array("i", tokens)
        except OverflowError:
            raise InputError("token ids must fit in 32 bits") from None

    async def lookup(self, body: LookupBody) -> LookupAnswer:
        """Raises InputError."""
        tokens = self.tokens_of(body)
        members = {n: m for n, m in (await self.members()).items() if _may_be(body.model, m.record)}
        found = await self.prefixes(body, tokens, members)
        return LookupAnswer(len(tokens), _by_instance(members, found))

    async def kept_keys(self, body: LookupBody, instance: str) -> list[bytes]:
        """Keys of the chunks that all of an engine's shares have. Raises InputError."""
        members = {n: m for n, m in (await self.members()).items() if m.record.instance == instance}
        tokens = self.tokens_of(body)
        found = await self.prefixes(body, tokens, members)
        by_space: dict[str, int] = {}
        for number, member in members.items():
            space, count = member.record.namespace, len(found.get(number, ()))
            by_space[space] = max(count, by_space.get(space, 0))
        keys = self._keys(body, tokens, next(iter(members.values())).record, {})
        return keys[: min(by_space.values())]

    async def prefixes(
        self, body: LookupBody, tokens: array[int], members: Members
    ) -> dict[int, list[tuple[int, int]]]:
        """Of each worker that has any: the chunks of the longest prefix that it has, each with how
        many tokens it is and a bit for each tier that has it."""
        out: dict[int, list[tuple[int, int]]] = {}
        keys_by_chain: dict[tuple[bytes, int, int], list[bytes]] = {}
        for group in _groups(members):
            record = members[group[0]].record
            keys = self._keys(body, tokens, record, keys_by_chain)
            space = bytes.fromhex(record.namespace)
            names = [chunk_name(space, key) for key in keys]
            live, at = set(group), 0
            while live and at < len(names):
                part = await self.directory.find(names[at : at + MOST_NAMES])
                for holders in part:
                    tiers = {h.number: h.tiers for h in holders if h.number in live}
                    size = min(record.chunk, len(tokens) - at * record.chunk) if tokens else 0
                    for number, bits in tiers.items():
                        out.setdefault(number, []).append((size or record.chunk, bits))
                    live, at = set(tiers), at + 1
                if len(part) < MOST_NAMES:
                    break
        return out

    def _keys(
        self, body: LookupBody, tokens: array[int], record: WorkerRecord,
        known: dict[tuple[bytes, int, int], list[bytes]],
    ) -> list[bytes]:  # fmt: skip
        if body.chunks:
            return keys_in(body.chunks)
        seed = seed_of(record, salt=body.salt, adapter=body.adapter, tags=body.tags)
        if seed is None:
            return []
        chain = seed, record.grain, record.chunk
        if chain not in known:
            ids: Any = tokens  # it asks for no more than an array's bytes
            known[chain] = chunk_keys(seed, ids, record.grain, record.chunk)
        return known[chain]


def _groups(members: Members) -> Iterable[list[int]]:
    """Numbers of workers that have the same names for the same chunks."""
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for number, member in members.items():
        r = member.record
        if len(r.namespace) == 2 * LINK:
            fields = tuple(sorted((k, v) for k, v in r.fields.items() if k != "door"))
            groups[r.namespace, r.chunk, r.grain, r.keys, fields].append(number)
    return groups.values()


def _may_be(model: str, record: WorkerRecord) -> bool:
    """A worker that names no model, but weights, may be of any."""
    return not model or not record.model or record.model == model


def _by_instance(
    members: Members, found: Mapping[int, list[tuple[int, int]]]
) -> dict[str, InstanceHit]:
    """An engine has what all of its shares have: of each, the worker that has most."""
    shares: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, member in members.items():
        shares[member.record.instance][member.record.namespace].append(number)
    out: dict[str, InstanceHit] = {}
    for instance, by_space in shares.items():
        best = [
            max(numbers, key=lambda n: sum(size for size, _ in found.get(n, ())))
            for numbers in by_space.values()
        ]
        tokens = min(sum(size for size, _ in found.get(n, ())) for n in best)
        if not tokens:
            continue
        nbytes, tiers = 0, dict[str, int]()
        for number in best:
            record, left = members[number].record, tokens
            nbytes += tokens * token_bytes_of(record)
            mine: dict[str, int] = {}
            for size, bits in found[number]:
                size, left = min(size, left), left - min(size, left)
                for i, tier in enumerate(record.tiers):
                    if bits >> i & 1:
                        mine[tier] = mine.get(tier, 0) + size
            tiers = {t: min(n, tiers.get(t, n)) for t, n in mine.items() if n}
        workers = sum(map(len, by_space.values()))
        out[instance] = InstanceHit(tokens, nbytes, tiers, workers)
    return dict(sorted(out.items(), key=lambda item: -item[1].tokens))


def require_instance(instances: Mapping[str, Any], name: str) -> None:
    """Raise InputError where no such engine lives."""
    if name not in instances:
        known = ", ".join(list(instances)[:20]) or "none lives"
        raise InputError(f"instance {name!r:.200}: no heartbeat of it; known: {known}")
