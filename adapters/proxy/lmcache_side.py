"""What engines with LMCache's own hand-off want of a proxy.

LMCache's prefiller is told where the decoder listens, writes the KV there, answers with the first
token, and sends a note when all has come (`tierloom.pipeline.handoff.proxy_notice`). The decoder is
asked after that, with the client's own bytes: it finds the prompt's KV, and computes the last token
of the prompt. LMCache's proxy would pass the first token on instead, and answer as chat what
completions say; logprobs, tools and several answers do not come through that.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from tierloom.pipeline.handoff.proxy_notice import unpack_notice
from tierloom.stages.errors import ConfigError, require
from tierloom.stages.tiers.net.address import Address

log = logging.getLogger("tierloom.proxy")


class ReceiverPorts(NamedTuple):
    """LMCache's `pd_peer_init_port` and `pd_peer_alloc_port` of a decoder: one for each rank."""

    init: list[int]
    alloc: list[int]

    @classmethod
    def parsed(cls, text: str) -> ReceiverPorts:
        """`7300/7400`, or `7300,7301/7400,7401`. Raises ConfigError."""
        init, _, alloc = text.partition("/")
        try:
            ports = cls(*([int(port) for port in part.split(",")] for part in (init, alloc)))
        except ValueError:
            ports = cls([], [])
        odd = [port for port in (*ports.init, *ports.alloc) if not 0 < port < 1 << 16]
        if odd or not ports.init or len(ports.init) != len(ports.alloc):
            raise ConfigError(
                f"receiver {text!r}: write INIT/ALLOC, as in 7300/7400, or 7300,7301/7400,7401 for "
                "two ranks"
            )
        return ports


class Awaited:
    """A prompt that is to come to a decoder."""

    def __init__(self, host: str, ports: ReceiverPorts) -> None:
        self.name, self._host, self._ports = uuid.uuid4().hex, host, ports
        self._left = len(ports.init)
        self._came = asyncio.Event()

    @property
    def params(self) -> dict[str, Any]:
        """What its prefiller is told."""
        return {
            "ret_first_tok": True,
            "disagg_spec": {
                "req_id": self.name, "receiver_host": self._host,
                "receiver_init_port": self._ports.init, "receiver_alloc_port": self._ports.alloc,
            },
        }  # fmt: skip

    def note(self) -> None:
        """A rank of the prefiller is through."""
        self._left -= 1
        if not self._left:
            self._came.set()

    async def wait(self, seconds: float) -> bool:
        """Until all ranks are through; False: that took too long."""
        try:
            await asyncio.wait_for(self._came.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True


class LmcacheSide:
    """Where notes come in."""

    def __init__(self, at: str, wait: float) -> None:
        """`at`: HOST:PORT, for LMCache's `pd_proxy_host` and `pd_proxy_port`; port 0: a free one.
        `wait`: seconds for the note to come after the prefiller's answer. Raises ConfigError."""
        require("events", "zmq")
        import zmq
        import zmq.asyncio

        try:
            where = Address.parse(f"tcp://{at}", "tcp", port=-1)
        except ValueError:
            where = Address()
        if not where.host or where.port < 0:
            raise ConfigError(f"--lmcache {at!r}: write HOST:PORT, as pd_proxy_host and _port have")
        host = "*" if where.host == "0.0.0.0" else where.host
        self.wait = wait
        self._awaited: dict[str, Awaited] = {}
        self._socket: Any = zmq.asyncio.Context.instance().socket(zmq.PULL)
        try:
            self._socket.bind(f"tcp://{host}:{where.port}")
        except zmq.ZMQError as error:
            self._socket.close(0)
            raise ConfigError(f"--lmcache {at}: {error}") from None
        self.port = int(bytes(self._socket.get(zmq.LAST_ENDPOINT)).rpartition(b":")[2])

    @contextmanager
    def expected(self, host: str, ports: ReceiverPorts) -> Iterator[Awaited]:
        """A prompt that is to come to the decoder there, for as long as somebody waits."""
        made = Awaited(host, ports)
        self._awaited[made.name] = made
        try:
            yield made
        finally:
            del self._awaited[made.name]

    async def listen(self) -> None:
        """Take notes, for as long as the proxy runs."""
        while True:
            raw = await self._socket.recv()
            try:
                made = self._awaited.get(unpack_notice(raw))
            except ValueError as error:
                log.warning("proxy: --lmcache: %s", error)
            else:
                if made is not None:
                    made.note()

    def close(self) -> None:
        self._socket.close(0)


def is_handed(params: Mapping[str, Any] | None) -> bool:
    """A prefiller's answer is that of LMCache's."""
    return type((params or {}).get("first_tok")) is int
