"""Objects in a bucket that NIXL reads straight into their leases; the rest is the `s3` tier's.

Transfers run on threads of the plugin's, and are looked at from the loop. One whose reader has gone
cannot be ended: it keeps its lease until it is through.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anyio

from ..errors import Damaged, TierDown
from ..object import Header, Object
from ..space import PAGE
from .nixl_agent import Agent
from .profile import find_profile
from .s3 import S3, S3Options, name_of

if TYPE_CHECKING:
    from ..arena import Lease
    from .base import TierContext
    from .nixl_agent import Transfer

log = logging.getLogger(__name__)

_PATIENCE = 5.0  # seconds that closing waits for transfers whose readers have gone
_FIRST = PAGE + (4 << 20)  # what is read to learn an object's header
_SWEEP = 0.02  # seconds between two looks at those
_LOOK = 0.001  # seconds between two looks at least: a look from the loop costs some 30 us


class NixlObjects(S3):
    """Reads by NIXL, on the loop's thread alone."""

    def __init__(self, options: S3Options, ctx: TierContext, *, backend: str, threads: int) -> None:
        super().__init__(options, ctx)
        self._backend, self._threads = backend, threads
        self._agent: Agent | None = None
        self._numbers = iter(range(1, 1 << 62))  # by which a transfer names its object
        self._left: list[tuple[Transfer, _Mine]] = []

    async def open(self) -> None:
        await super().open()
        if self._agent is None:
            self._agent = await self.ctx.pool(self._start)

    async def close(self) -> None:
        with anyio.move_on_after(_PATIENCE):
            while self._sweep():  # noqa: ASYNC110 (nothing tells when a transfer is through)
                await anyio.sleep(0.01)
        if self._left:  # they may still write into the arena, which therefore stays
            log.error("transfers left under way", extra={"transfers": len(self._left)})
        elif self._agent is not None:
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

    async def _first(self, key: bytes) -> tuple[Object, int]:
        name = name_of(key)
        size = await self._bucket.size(name)
        if size is None:
            raise FileNotFoundError(name)
        if size < PAGE or size % PAGE:
            Header.length((await self._bucket.get(name, PAGE))[0])  # a later format's may be
            raise Damaged(f"no object is {size} bytes long")
        lease = self.ctx.arena.lease(size)
        try:
            first = min(size, _FIRST)
            await self._load(name, lease, 0, first)
            return Object(self._header(lease.view[:first], key, size), lease), first
        except BaseException:
            lease.release()
            raise

    async def _part(self, name: str, lease: Lease, end: int, start: int) -> None:
        await self._load(name, lease, start, min(end, start + self.options.part))

    async def _load(self, name: str, lease: Lease, start: int, stop: int) -> None:
        """Bytes `start` to `stop` of an object of the lease's length, to the same place in it.
        Raises FileNotFoundError when it is not there any more, TierDown."""
        agent = self._agent
        assert agent is not None
        number = next(self._numbers)
        known = agent.register([(0, lease.nbytes, number, self._bucket.key_of(name))], "OBJ")
        mine = _Mine(lease, agent, known)
        try:
            transfer = agent.begin(
                "READ", [(start, stop - start, number)], "OBJ", lease.address + start
            )
        except BaseException:
            mine.end()
            raise
        try:
            while not transfer.done():  # noqa: ASYNC110
                await anyio.sleep(max(_LOOK, transfer.pause))
        except TierDown:
            mine.end()
            if await self._bucket.size(name) != lease.nbytes:
                raise FileNotFoundError(name) from None
            raise
        except BaseException:
            self._left.append((transfer, mine))
            asyncio.get_running_loop().call_later(_SWEEP, self._sweep_on)
            raise
        mine.end()

    def _sweep_on(self) -> None:
        if self._sweep():
            asyncio.get_running_loop().call_later(_SWEEP, self._sweep_on)

    def _sweep(self) -> bool:
        """End what is through of the transfers whose readers have gone; whether any are left."""
        left, self._left = self._left, []
        for transfer, mine in left:
            try:
                through = transfer.done()
            except TierDown:
                through = True
            if through:
                mine.end()
            else:
                self._left.append((transfer, mine))
        return bool(self._left)


class _Mine:
    """What a transfer needs until it is through: its lease, and its object's registration."""

    def __init__(self, lease: Lease, agent: Agent, known: object) -> None:
        self._lease, self._agent, self._known = lease.retain(), agent, known

    def end(self) -> None:
        try:
            self._agent.deregister(self._known)
        finally:
            self._lease.release()
