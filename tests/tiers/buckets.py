"""Servers of buckets and what stands between: started on free ports, stopped by their own id."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BIN = Path(sys.executable).parent
KEY, SECRET = "testkey", "testsecret12345"
NAME = "tierloom"
_libc = ctypes.CDLL(None)


def missing(what: str) -> NoReturn:
    """Skip, or fail where engines are required."""
    reason = f"{what} is not installed: make engines"
    if os.environ.get("TIERLOOM_REQUIRE_ENGINES"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def need(module: str) -> None:
    """The test wants this module."""
    if importlib.util.find_spec(module) is None:
        missing(module)


def program(name: str) -> str:
    """The path of a program that the tests' environment has."""
    found = BIN / name
    if not found.exists():
        missing(name)
    return str(found)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Server:
    """A child process that listens on a port; ends with us, however we end."""

    def __init__(self, command: list[str], port: int, log: Path) -> None:
        self.command, self.port, self.log = command, port, log
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=lambda: _libc.prctl(1, signal.SIGTERM),  # when its parent dies
            )  # fmt: skip
        end = time.monotonic() + 30
        while True:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), 0.3),
            ):
                return
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"{self.command[0]} did not start:\n{self.log.read_text()}")
            time.sleep(0.02)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(10)

    @contextlib.contextmanager
    def hung(self) -> Iterator[None]:
        """It takes connections and answers nothing."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def localbucket(folder: Path, *names: str) -> Iterator[Server]:
    """Objects are the files of `folder/NAME`; no signature is checked."""
    for name in names or (NAME,):
        (folder / name).mkdir(parents=True)
    port = free_port()
    server = Server(
        [program("localbucket"), "--port", str(port), str(folder)], port, folder / "log"
    )
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def moto(folder: Path) -> Iterator[Server]:
    """Much of AWS, in memory."""
    port = free_port()
    command = [program("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    server = Server(command, port, folder / "log")
    try:
        import urllib.request

        request = urllib.request.Request(f"{server.url}/{NAME}", method="PUT")
        request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/x")
        urllib.request.urlopen(request, timeout=30).close()
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def rclone(folder: Path) -> Iterator[Server]:
    """Checks signatures against KEY and SECRET."""
    (folder / NAME).mkdir(parents=True)
    port = free_port()
    command = [
        program("rclone"), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key",
        f"{KEY},{SECRET}", "--force-path-style", "--vfs-cache-mode", "off", "--etag-hash", "",
        "--config", "/dev/null", str(folder),
    ]  # fmt: skip
    server = Server(command, port, folder / "log")
    try:
        yield server
    finally:
        server.stop()


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
                there = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                return
            self._sockets += [here, there]
            threading.Thread(target=self._pump, args=(here, there, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(there, here, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, asks: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
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
