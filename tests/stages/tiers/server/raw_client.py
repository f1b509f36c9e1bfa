"""Clients and servers that do as they please: bare sockets with the words of the protocol."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tierloom.stages.tiers.server import protocol as wire
from tierloom.stages.tiers.server.protocol import Kind
from tierloom.testing import NAMESPACE

if TYPE_CHECKING:
    from collections.abc import Callable


def connected(url: str, timeout: float = 20) -> socket.socket:
    parts = urlsplit(url)
    if parts.scheme.endswith("unix"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(timeout)
        sock.connect(parts.path)
        return sock
    return socket.create_connection((parts.hostname, parts.port), timeout)


def exactly(sock: socket.socket, nbytes: int) -> bytes:
    got = b""
    while len(got) < nbytes:
        piece = sock.recv(nbytes - len(got))
        if not piece:
            raise ConnectionError("closed")
        got += piece
    return got


def receive(sock: socket.socket) -> wire.Message:
    kind, number, length = wire.head(exactly(sock, wire.HEAD.size))
    return wire.Message(kind, number, exactly(sock, length))


def greet(
    sock: socket.socket, *, token: bytes = b"", flags: int = 0, namespace: bytes = NAMESPACE
) -> wire.Message:
    """Say who we are; what the server says to it."""
    greeting = wire.unpack(wire.Greeting, receive(sock).body)
    nonce = bytes(wire.NONCE)
    proof = wire.proof(token, b"client", greeting.epoch, greeting.nonce, nonce, namespace)
    hello = wire.Hello(wire.VERSION, flags, namespace, nonce, proof)
    sock.sendall(wire.message(Kind.HELLO, 0, wire.pack(hello)))
    return receive(sock)


def welcomed(url: str, **options: Any) -> socket.socket:
    sock = connected(url)
    try:
        assert greet(sock, **options).kind is Kind.WELCOME
    except BaseException:
        sock.close()
        raise
    return sock


def is_closed(sock: socket.socket) -> bool:
    """The server has hung up, after whatever it still had to say."""
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionError:
        return True
    return True


def reset(sock: socket.socket) -> None:
    """Close at once, as a process that dies does with unread data."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class FalseServer:
    """Greets like a server, then answers each question as `answer(sock, message)` does."""

    def __init__(
        self, answer: Callable[[socket.socket, wire.Message], None], *, largest: int = 1 << 30,
        flags: int = 0,
    ) -> None:  # fmt: skip
        self._answer, self._largest, self._flags = answer, largest, flags
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._socks: list[socket.socket] = []
        self.url = f"tierloom://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """Ends every thread, and with it every socket."""
        self._listener.shutdown(socket.SHUT_RDWR)  # a blocked `accept` does not notice `close`
        self._threads[0].join()
        self._listener.close()
        for sock in self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(20)
        for sock in self._socks:
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._socks.append(sock)
            self._threads.append(threading.Thread(target=self._serve, args=[sock], daemon=True))
            self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            nonce, epoch = bytes(wire.NONCE), b"e" * 16
            greeting = wire.pack(wire.Greeting(1, 1, False, epoch, nonce))
            sock.sendall(wire.message(Kind.GREETING, 0, greeting))
            hello = wire.unpack(wire.Hello, receive(sock).body)
            proof = wire.proof(b"", b"server", epoch, nonce, hello.nonce, hello.namespace)
            welcome = wire.pack(wire.Welcome(self._flags, proof, 1 << 20, self._largest, 0))
            sock.sendall(wire.message(Kind.WELCOME, 0, welcome))
            while True:
                message = receive(sock)
                if message.kind is Kind.STAT:
                    holds = wire.pack(wire.Holdings(0, 0, 0, 0, 0))
                    sock.sendall(wire.message(Kind.HOLDS, message.number, holds))
                else:
                    self._answer(sock, message)
        except (OSError, ConnectionError, wire.BadMessage):
            sock.close()
