"""Mooncake and InfiniStore as processes of their own, on free loopback ports.

Every process dies with its test: it is stopped by its number, and by the kernel when the test
process itself is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent))  # as a script, with python -P
import install_pooled

BIN = Path(sys.executable).parent
_DEATHSIG = 1  # PR_SET_PDEATHSIG


def require(part: str) -> None:
    """Skip, with the reason, when an engine is not here; fail instead where it must be."""
    missing = ""
    if part == "mooncake":
        try:
            import mooncake.store  # noqa: F401
        except ImportError as error:
            missing = f"mooncake: {error}"
    elif not install_pooled.VERBS.exists():
        missing = f"infinistore: no {install_pooled.INFINISTORE.name}"
    if missing:
        missing += ": make engines"
        if os.environ.get("TIERLOOM_REQUIRE_ENGINES"):
            pytest.fail(missing)
        pytest.skip(missing)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Process:
    """A child, its output in a file. `port`: where it listens once it is up."""

    def __init__(
        self, command: list[str], log: Path, port: int, *, env: dict[str, str] | None = None
    ) -> None:
        self.command, self.log, self.port = command, log, port
        self._env = os.environ | {"MC_TCP_BIND_ADDRESS": "127.0.0.1"} | (env or {})
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.child = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                env=self._env, preexec_fn=_die_with_parent,
            )  # fmt: skip
        end = time.monotonic() + 30
        while time.monotonic() < end:
            if self.child.poll() is not None:
                break
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.3).close()
            except OSError:
                time.sleep(0.02)
            else:
                return
        self.kill()
        raise RuntimeError(f"{self.command[0]} did not come up:\n{self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGCONT)
            self.child.kill()
        self.child.wait()

    def freeze(self) -> None:
        """It lives, holds its connections, and answers nothing."""
        self.child.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.child.send_signal(signal.SIGCONT)


class MooncakePool:
    """A master and owners of memory. A lease keeps what was read or asked for from eviction."""

    def __init__(
        self, folder: Path, owners: int = 1, segment: int = 256 << 20, lease: str = "5s"
    ) -> None:
        self.folder, self.segment = folder, segment
        self.port = free_port()
        self.url = f"mooncakestore://127.0.0.1:{self.port}/"
        self.owners: list[Process] = []
        self.master = Process(
            [
                str(BIN / "mooncake_master"), f"--rpc_port={self.port}", "--rpc_address=127.0.0.1",
                f"--metrics_port={free_port()}", "--metrics_host=127.0.0.1",
                f"--default_kv_lease_ttl={lease}", "--client_ttl=3",
            ],
            folder / "master.log", self.port,
        )  # fmt: skip
        try:
            for _ in range(owners):
                self.add_owner()
        except BaseException:
            self.close()
            raise

    def add_owner(self) -> Process:
        ready = free_port()
        me = [sys.executable, str(Path(__file__).resolve()), "owner"]
        log = self.folder / f"owner-{len(self.owners)}.log"
        command = [*me, str(self.port), str(self.segment), str(ready)]
        self.owners.append(Process(command, log, ready))
        return self.owners[-1]

    def close(self) -> None:
        for process in (*self.owners, self.master):
            process.kill()


class InfiniServer(Process):
    """InfiniStore's server over TCP, with 1 GiB."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.url = f"infinistore://127.0.0.1:{port}"
        # Its own start writes oom_score_adj, which only a privileged process may.
        code = "import infinistore.server as s; s.prevent_oom = lambda: None; s.main()"
        super().__init__(
            [
                str(install_pooled.INFINISTORE / "bin" / "python"), "-c", code,
                "--service-port", str(port), "--manage-port", str(free_port()),
                "--prealloc-size", "1", "--minimal-allocate-size", "16", "--log-level", "error",
            ],
            folder / "infinistore.log", port, env={"LD_PRELOAD": str(install_pooled.VERBS)},
        )  # fmt: skip


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_DEATHSIG, signal.SIGKILL)


def own(master: str, segment: str, ready: str) -> None:
    """Lend memory to the pool until killed; listens at `ready` when it is lent."""
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    from mooncake.store import MooncakeDistributedStore

    store: Any = MooncakeDistributedStore()
    code = store.setup(
        "127.0.0.1", "P2PHANDSHAKE", int(segment), 16 << 20, "tcp", "", f"127.0.0.1:{master}"
    )
    if code:
        sys.exit(f"setup: {code}")
    with socket.create_server(("127.0.0.1", int(ready))) as door:
        while True:
            door.accept()[0].close()


if __name__ == "__main__":
    own(*sys.argv[2:])
