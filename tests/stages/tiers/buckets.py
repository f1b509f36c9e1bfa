"""Servers of buckets and what stands between: started on free ports, stopped by their own id."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

from processes import Process, free_port, program

from tierloom.testing import Pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

KEY, SECRET = "testkey", "testsecret12345"
NAME = "tierloom"


class Server(Process):
    """A bucket's server."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def localbucket(folder: Path, *names: str) -> Iterator[Server]:
    """Objects are the files of `folder/NAME`; no signature is checked."""
    for name in names or (NAME,):
        (folder / name).mkdir(parents=True)
    port = free_port()
    server = Server(
        [program("s3", "localbucket"), "--port", str(port), str(folder)], port, folder / "log"
    )
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def moto(folder: Path) -> Iterator[Server]:
    """Much of AWS, in memory."""
    port = free_port()
    command = [program("s3", "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    server = Server(command, port, folder / "log")
    try:
        import urllib.request

        request = urllib.request.Request(f"{server.url}/{NAME}", method="PUT")
        request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/x")
        urllib.request.urlopen(request, timeout=30).close()
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def rclone(folder: Path) -> Iterator[Server]:
    """Checks signatures against KEY and SECRET."""
    (folder / NAME).mkdir(parents=True)
    port = free_port()
    command = [
        program("s3", "rclone"), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key",
        f"{KEY},{SECRET}", "--force-path-style", "--vfs-cache-mode", "off", "--etag-hash", "",
        "--config", "/dev/null", str(folder),
    ]  # fmt: skip
    server = Server(command, port, folder / "log")
    try:
        yield server
    finally:
        server.kill()


class Gate:
    """A wire to a server on which bytes are held back while it is shut.

    `change(bytes) -> bytes`, where given, is done to each piece that the server answers.
    """

    def __init__(self, port: int) -> None:
        self._to = port
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Event()
        """Set when bytes for the server come."""
        self.change: Callable[[bytes], bytes] | None = None
        self.asked: Callable[[bytes], object] | None = None
        """Told each piece that a client sends, before it goes on."""
        self._sockets: list[socket.socket] = []
        self._ended = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._ended = True
        self.open.set()
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while not self._ended:
            try:
                here = self._listener.accept()[0]
            except OSError:
                return
            try:
                there = socket.create_connection(("127.0.0.1", self._to))
            except OSError:  # nobody is there, just now
                here.close()
                continue
            for each in (here, there):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [here, there]
            threading.Thread(target=self._pump, args=(here, there, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(there, here, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, asks: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                # Acknowledged at once: some servers wait for that, which takes 40 ms else.
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
                if asks:
                    self.reached.set()
                    if self.asked is not None:
                        self.asked(data)
                self.open.wait(60)
                if not asks and self.change is not None:
                    data = self.change(data)
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class GatedPool(Pool):
    """Threads that are never held back; what is held back is the wire."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.wire = gate
        self.gate, self.reached = self, gate.reached

    def set(self) -> None:
        self.wire.open.set()

    def clear(self) -> None:
        self.wire.open.clear()

    def begun(self) -> None:
        """What is held back is on its way to the bucket, not in a thread."""
