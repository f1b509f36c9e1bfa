"""What an engine's listener says to TAKE, OFFER and RANKS."""

from __future__ import annotations

import asyncio

from tierloom.pipeline.handoff.handoff import Handoff
from tierloom.pipeline.serve.giving import Giving
from tierloom.pipeline.serve.own_tiers import OwnTiers
from tierloom.pipeline.serve.terms import RateLimit
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.connection import Connection
from tierloom.stages.tiers.server.offering import HandoffOffer, OfferProgress
from tierloom.stages.tiers.server.ranks import pack_ranks
from tierloom.stages.tiers.server.taking import Take

_SAY = 0.25
"""Seconds between two answers to one offer, so that an engine that has died is told from one that
fetches."""


async def hand_over(
    connection: Connection, message: wire.Message, store: OwnTiers, space: bytes, limit: RateLimit
) -> None:
    """On the listener's loop. `space`: the client's namespace. Raises BadMessage, TierDown,
    OSError."""
    _, number, body = message
    if message.kind is wire.Kind.TAKE:
        await Giving(connection, number, store, space, limit).answer(Take.unpack(body))
    elif message.kind is wire.Kind.RANKS:
        await connection.send(wire.message(wire.Kind.RANKED, number, pack_ranks(store.ranks)))
    elif store.takes_offers and store.handoff is not None:
        await _take_offer(connection, number, store.handoff, HandoffOffer.unpack(body))
    else:
        raise wire.BadMessage("no offers are taken here")


async def _take_offer(
    connection: Connection, number: int, handoff: Handoff, offer: HandoffOffer
) -> None:
    """Have it fetched, and say how it goes until that is over. A client that goes ends it."""
    coming = asyncio.wrap_future(
        handoff.take_offer(offer.host, offer.port, offer.ticket, offer.chunks)
    )
    try:
        while not (await asyncio.wait([coming], timeout=_SAY))[0]:
            await _say(connection, number, OfferProgress(True, 0))
            if not connection.usable:
                return
        here = 0 if coming.cancelled() else coming.result()
        await _say(connection, number, OfferProgress(False, here))
    finally:
        coming.cancel()


async def _say(connection: Connection, number: int, progress: OfferProgress) -> None:
    await connection.send(wire.message(wire.Kind.OFFERED, number, progress.pack()))
