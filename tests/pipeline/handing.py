"""A prefiller and a decoder as pipelines, and one who lies."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING, Any

from conftest import config, settle, tokens

from tierloom.pipeline.handoff.handoff import ticket_of
from tierloom.stages.kv.prefix import Chain
from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.taking import Take

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from tierloom import Pipeline

IDS = tokens(192)
TICKET = ticket_of("a request")


def prefiller(**changes: Any) -> dict[str, Any]:
    return config(serve={"tiers": ["hot"]} | changes.pop("serve", {}), **changes)


def decoder(**changes: Any) -> dict[str, Any]:
    handoff = {"peers": ["127.0.0.1"], "wait": "20 s"} | changes.pop("handoff", {})
    return config(handoff=handoff, **changes)


def chunks_of(pipe: Pipeline, ids: np.ndarray = IDS) -> list[bytes]:
    """Grain links of each chunk."""
    chain = Chain(pipe.names.digest, 16)
    chain.extend(ids)
    return [b"".join(chain.links[i : i + 4]) for i in range(0, len(chain.links), 4)]


def keys_of(pipe: Pipeline, ids: np.ndarray = IDS) -> list[bytes]:
    return [links[-32:] for links in chunks_of(pipe, ids)]


def promise(pipe: Any, ids: np.ndarray = IDS, ticket: bytes = TICKET) -> None:
    """Until it is open."""
    pipe.handoff.promise(ticket, chunks_of(pipe, ids))
    pipe._portal.call(_nothing)


async def _nothing() -> None:
    pass


def begin_land(
    pipe: Any, at: Any, ids: np.ndarray = IDS, ticket: bytes = TICKET, *, later: bool = False
) -> Any:
    host, port = at.serves_at.removeprefix("tierloom://").split(":") if at else ("127.0.0.1", 1)
    return pipe.handoff.land(host, int(port), ticket, chunks_of(pipe, ids), later=later)


def land(pipe: Any, at: Any, ids: np.ndarray = IDS, ticket: bytes = TICKET) -> int:
    came: int = begin_land(pipe, at, ids, ticket).result(30)
    settle(pipe)
    return came


class Liar:
    """A listener that welcomes, and answers every question with what it is told to."""

    def __init__(
        self, answer: Callable[[socket.socket, int, Any], None], *, flags: int = 0,
        read: Callable[[bytes], Any] = Take.unpack,
    ) -> None:  # fmt: skip
        """`read`: makes of a question's body what `answer` gets."""
        self._flags, self._read = flags, read
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.serves_at = f"tierloom://127.0.0.1:{self._listener.getsockname()[1]}"
        self._answer, self.asked = answer, 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock:
                epoch, nonce = bytes(16), bytes(32)
                greeting = wire.Greeting(wire.VERSION, wire.VERSION, False, epoch, nonce)
                sock.sendall(wire.message(wire.Kind.GREETING, 0, wire.pack(greeting)))
                hello = wire.unpack(wire.Hello, _read(sock).body)
                proof = wire.proof(b"", b"server", epoch, nonce, hello.nonce, hello.namespace)
                welcome = wire.Welcome(self._flags, proof, 1 << 26, 1 << 26, 0)
                sock.sendall(wire.message(wire.Kind.WELCOME, 0, wire.pack(welcome)))
                message = _read(sock)
                self.asked += 1
                self._answer(sock, message.number, self._read(message.body))

    def close(self) -> None:
        self._listener.close()


def _read(sock: socket.socket) -> wire.Message:
    kind, number, length = wire.head(_exactly(sock, wire.HEAD.size))
    return wire.Message(kind, number, _exactly(sock, length))


def _exactly(sock: socket.socket, nbytes: int) -> bytes:
    got = b""
    while len(got) < nbytes and (piece := sock.recv(nbytes - len(got))):
        got += piece
    return got
