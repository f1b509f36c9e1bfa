"""Which engine has what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import anyio

from tierloom.stages.tiers.peers.holder import Holder


class HolderDirectory(Protocol):
    """Who knows what engines keep."""

    async def holders(self, keys: Sequence[bytes]) -> list[list[str]]:
        """Addresses of the engines that have each key. Never raises: what is not known, nobody
        has."""

    async def lenders(self) -> list[str]:
        """Addresses of the engines that may lend memory. Raises TierDown, OSError, TimeoutError."""

    def missed(self, key: bytes, address: str) -> None:
        """The engine there, which was named for it, did not have it."""

    async def close(self) -> None:
        """Release everything."""


class AskAll:
    """The directory of those who have none: every engine is asked what it has, all at once."""

    def __init__(self, peers: Mapping[str, Holder], hedge: float | None) -> None:
        """`peers`: by address, as they are then. `hedge`: seconds; None: wait for all."""
        self._peers, self._hedge = peers, hedge

    async def holders(self, keys: Sequence[bytes]) -> list[list[str]]:
        """Who is slow while others have all of it is not waited for, and put aside."""
        asked = {a: h for a, h in self._peers.items() if h.healthy}
        answers: dict[str, list[bool]] = {}
        heard = anyio.Event()

        async def ask(address: str, holder: Holder) -> None:
            nonlocal heard
            answers[address] = await holder.keeps(keys)
            heard.set()
            heard = anyio.Event()

        def enough(*, late: bool) -> bool:
            every = len(answers) == len(asked)
            return every or (late and all(map(any, zip(*answers.values(), strict=True))))

        if asked:
            async with anyio.create_task_group() as tasks:
                for address, holder in asked.items():
                    tasks.start_soon(ask, address, holder)
                with anyio.move_on_after(self._hedge):
                    while not enough(late=False):
                        await heard.wait()
                while not enough(late=bool(answers)):
                    await heard.wait()
                for address in asked.keys() - answers.keys():
                    asked[address].suspect()
                tasks.cancel_scope.cancel()
        return [[a for a, found in answers.items() if found[i]] for i in range(len(keys))]

    async def lenders(self) -> list[str]:
        return list(self._peers)

    def missed(self, key: bytes, address: str) -> None:
        """It has said so itself."""

    async def close(self) -> None:
        """The engines are the tier's."""
