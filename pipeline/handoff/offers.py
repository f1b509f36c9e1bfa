"""Offers: prompts that are computed here for decoders that a proxy has named.

A decoder is told as soon as a prompt is begun, and fetches by a TAKE of its own. It is told once
more when the prompt is through, if it lacks some of it; then the proxy is told, whatever came.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import anyio

from tierloom.pipeline.config.spec import HandoffOptions
from tierloom.pipeline.handoff.dialed_engines import DIAL, DialedEngine, DialedEngines
from tierloom.pipeline.handoff.proxy_notice import ProxyNotices
from tierloom.stages.errors import TierDown
from tierloom.stages.tiers.net.address import Address
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.client import refuse
from tierloom.stages.tiers.server.offering import HandoffOffer, OfferProgress

if TYPE_CHECKING:
    from tierloom.pipeline.handoff.handoff import ToldDecoder

log = logging.getLogger("tierloom.handoff")

_CLOSE = 0.5
"""Seconds that notes have left at the end."""


class OfferedPrompt:
    """One prompt, from its first step to the note of its end."""

    def __init__(self, receiver: ToldDecoder, chunks: Sequence[bytes]) -> None:
        self.receiver, self.chunks = receiver, chunks
        self.over = asyncio.Event()
        """All of it is computed."""
        self.scope: anyio.CancelScope | None = None
        """Of what the decoder may take."""
        self.until = math.inf
        """When that ends, by the loop's clock."""
        self.task: asyncio.Task[None] | None = None

    def limit(self, seconds: float) -> None:
        """The decoder is waited for no longer than that from now on."""
        self.until = min(self.until, asyncio.get_running_loop().time() + seconds)
        if self.scope is not None:
            self.scope.deadline = self.until


class Offers:
    """All prompts of one pipeline. On its loop."""

    def __init__(
        self, options: HandoffOptions, engines: DialedEngines, release: Callable[[bytes], None], *,
        seconds: float,
    ) -> None:  # fmt: skip
        """`release`: called with the ticket of a prompt that is over. `seconds`: after which no
        decoder is waited for. Raises MissingPackage."""
        self._options, self._engines, self._release = options, engines, release
        self._seconds = seconds
        self._notices = ProxyNotices(options.proxy) if options.proxy else None
        self._prompts: dict[bytes, OfferedPrompt] = {}
        self._telling: set[asyncio.Task[None]] = set()
        self._number = 0
        self.taken = 0
        """Prompts of which a decoder has had all."""

    def __len__(self) -> int:
        return len(self._prompts)

    def begin(
        self, ticket: bytes, receiver: ToldDecoder, chunks: Sequence[bytes], at: Address
    ) -> None:
        """Have a decoder fetch what is promised under `ticket`, which is open. `at`: where this
        engine serves."""
        if chunks and not at.path and at.host and ticket not in self._prompts:
            prompt = self._prompts[ticket] = OfferedPrompt(receiver, chunks)
            prompt.task = asyncio.create_task(self._lead(ticket, prompt, at))

    def end(self, ticket: bytes, receiver: ToldDecoder) -> None:
        """A prompt is computed, or was never begun: its proxy is told as soon as nothing more
        comes of it."""
        prompt = self._prompts.get(ticket)
        if prompt is None or prompt.receiver != receiver:
            if ticket and prompt is None:
                self._release(ticket)
            self._tell(receiver)
            return
        prompt.limit(self._seconds)
        prompt.over.set()

    def forget(self, ticket: bytes) -> None:
        """A request was given up: nobody waits for its end."""
        if (prompt := self._prompts.pop(ticket, None)) is not None and prompt.task is not None:
            prompt.task.cancel()

    def clear(self) -> None:
        """No decoder fetches any more; proxies are told all the same."""
        for prompt in self._prompts.values():
            prompt.limit(0)

    async def close(self) -> None:
        for ticket in list(self._prompts):
            self.forget(ticket)
        if self._telling:
            await asyncio.wait(self._telling, timeout=_CLOSE)
        for task in self._telling:
            task.cancel()
        if self._notices is not None:
            self._notices.close()

    async def _lead(self, ticket: bytes, prompt: OfferedPrompt, at: Address) -> None:
        here, count = 0, len(prompt.chunks)
        try:
            with anyio.CancelScope(deadline=prompt.until) as prompt.scope:
                here = await self._offer(ticket, prompt, at)
                await prompt.over.wait()
                if here < count:  # it had to wait too long, or had no room
                    here = await self._offer(ticket, prompt, at)
            await prompt.over.wait()
        finally:
            if self._prompts.get(ticket) is prompt:
                del self._prompts[ticket]
        self.taken += here == count
        self._release(ticket)
        self._tell(prompt.receiver)

    async def _offer(self, ticket: bytes, prompt: OfferedPrompt, at: Address) -> int:
        """Have the decoder fetch what is there or comes soon; how many chunks it has then."""
        host, port = prompt.receiver.host, prompt.receiver.port
        engine = self._engines.engine(host, port)
        if engine is None or engine.busy >= self._options.connections or not self._options.wait:
            return 0
        engine.busy += 1
        try:
            offer = HandoffOffer(ticket, at.host, at.port, prompt.chunks)
            return await self._asked(engine, offer)
        except (OSError, TimeoutError, TierDown) as error:
            engine.failed(error)
        except Exception:
            log.exception("an offer to %s failed", engine.name)
        finally:
            engine.busy -= 1
        return 0

    async def _asked(self, engine: DialedEngine, offer: HandoffOffer) -> int:
        """Raises OSError, TimeoutError, TierDown."""
        async with AsyncExitStack() as stack:
            with anyio.fail_after(DIAL):
                connection = await stack.enter_async_context(engine.client.connection())
            if not engine.client.welcome.flags & wire.OFFERS:
                self._engines.refuse(f"{engine.name} takes no offers: set its handoff.offers")
                return 0
            number = self._number = (self._number + 1) & 0xFFFFFFFF
            await connection.send(wire.message(wire.Kind.OFFER, number, offer.pack()))
            while True:
                with anyio.fail_after(self._options.wait):
                    message = await connection.message()
                refuse(message, wire.Kind.OFFERED)
                if message.number != number:
                    raise wire.BadMessage("a reply to another question")
                said = OfferProgress.unpack(message.body, len(offer.chunks))
                if not said.going:
                    engine.came()
                    return said.here

    async def _told(self, notices: ProxyNotices, receiver: ToldDecoder) -> None:
        try:
            await notices.tell(receiver.request, receiver.notices, self._options.wait)
        except Exception:
            log.exception("the proxy at %s cannot be told", notices.at)

    def _tell(self, receiver: ToldDecoder) -> None:
        if self._notices is None:
            self._engines.refuse("a proxy names decoders, and handoff.proxy does not name it")
            return
        task = asyncio.create_task(self._told(self._notices, receiver))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)
