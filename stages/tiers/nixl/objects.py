"""Objects in a bucket that NIXL reads straight into their leases; the rest is the `s3` tier's.

Transfers run on threads of the plugin's, and are polled from the loop. One whose reader was
cancelled cannot be ended: it keeps its lease until it is through.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from urllib.parse import urlsplit

import anyio

from tierloom.stages.errors import Damaged, TierDown
from tierloom.stages.kv.object import Header
from tierloom.stages.memory.allocator import PAGE
from tierloom.stages.memory.arena import Lease
from tierloom.stages.memory.held import held
from tierloom.stages.tiers.buckets.aws_profile import find_profile
from tierloom.stages.tiers.buckets.bucket import S3Options
from tierloom.stages.tiers.buckets.s3 import S3, object_name
from tierloom.stages.tiers.contract.object_reader import ObjectReader
from tierloom.stages.tiers.contract.tier import TierContext
from tierloom.stages.tiers.nixl.agent import Agent, Transfer

_FIRST = PAGE + (4 << 20)  # what is read to learn an object's header
_LOOK = 0.001  # seconds between two looks at least: a look from the loop costs some 30 us


class NixlObjects(S3):
    """Reads by NIXL, on the loop's thread alone."""

    def __init__(self, options: S3Options, ctx: TierContext, *, backend: str, threads: int) -> None:
        super().__init__(options, ctx)
        self._backend, self._threads = backend, threads
        self._agent: Agent | None = None
        self._numbers = iter(range(1, 1 << 62))  # by which a transfer names its object

    async def open(self) -> None:
        await super().open()
        if self._agent is None:
            self._agent = await self.ctx.pool(self._start, leases=())

    async def close(self) -> None:
        await super().close()
        if self._agent is not None and not self._bucket.transfers:
            self._agent.close()
            self._agent = None

    def _start(self) -> Agent:
        return Agent(self._backend, self._params(), self.ctx.arena, shared=False)

    def _params(self) -> dict[str, str]:
        """What the plugin is told. It finds credentials in the environment, like obstore."""
        o, parts = self.options, urlsplit(self.options.url)
        if self._backend == "AZURE_BLOB":
            account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
            there = o.endpoint or f"https://{account}.blob.core.windows.net"
            return {"container_name": parts.netloc, "account_url": there}
        profile = find_profile(o.profile)
        told = {"bucket": parts.netloc, "num_threads": str(self._threads)}
        told |= {"use_virtual_addressing": "false" if o.path_style else "true"}
        told |= {"req_checksum": "required"}
        if o.endpoint:
            told |= {"endpoint_override": o.endpoint, "scheme": urlsplit(o.endpoint).scheme}
        if region := o.region or (profile.region if profile else ""):
            told["region"] = region
        if profile:
            keys = profile()
            told["access_key"] = str(keys["access_key_id"])
            told["secret_key"] = str(keys["secret_access_key"])
            if keys["token"]:
                told["session_token"] = str(keys["token"])
        return told

    async def _first(self, reader: ObjectReader) -> tuple[Header, int]:
        key = reader.read.key
        name = object_name(key)
        size = await self._bucket.size(name)
        if size is None:
            raise FileNotFoundError(name)
        if size < PAGE or size % PAGE:
            reader.seen = bytes((await self._bucket.get(name, PAGE))[0])
            Header.length(reader.seen)  # a later format's may be
            raise Damaged(f"an object cannot be {size} bytes long")
        lease, first = reader.lease(size), min(size, _FIRST)
        await self._load(name, lease, 0, first)
        reader.seen = bytes(lease.view[:PAGE])
        return self._header(lease.view[:first], key, size), first

    async def _part(self, name: str, lease: Lease, end: int, start: int) -> None:
        await self._load(name, lease, start, min(end, start + self.options.part))

    async def _load(self, name: str, lease: Lease, start: int, stop: int) -> None:
        """Bytes `start` to `stop` of an object of the lease's length, to the same place in it.
        Raises FileNotFoundError when it is not there any more, TierDown."""
        agent = self._agent
        assert agent is not None
        number = next(self._numbers)
        address = lease.at(start, stop - start)
        known = agent.register([(0, lease.nbytes, number, self._bucket.key_of(name))], "OBJ")
        over = partial(agent.deregister, known)
        try:
            transfer = agent.begin("READ", [(start, stop - start, number)], "OBJ", address)
        except BaseException:
            over()
            raise
        with held(lease):
            try:
                while not transfer.done():  # noqa: ASYNC110
                    await anyio.sleep(max(_LOOK, transfer.pause))
            except TierDown:
                over()
                if await self._bucket.size(name) != lease.nbytes:
                    raise FileNotFoundError(name) from None
                raise
            except BaseException:
                self._bucket.transfers.keep(lease, partial(_through, transfer, over))
                raise
            over()


def _through(transfer: Transfer, over: Callable[[], None]) -> bool:
    """Whether a transfer is over, however it ended; if so, its object is deregistered."""
    try:
        if not transfer.done():
            return False
    except TierDown:
        pass
    with suppress(TierDown):
        over()
    return True
