"""Mooncake and InfiniStore as processes of their own, on free loopback ports."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))  # as a script, with python -P
import install_pooled
from processes import BIN, Process, free_port, missing

_LOOPBACK = {"MC_TCP_BIND_ADDRESS": "127.0.0.1"}


def require(part: str) -> None:
    """Skip, with the reason, when an engine is not here; fail instead where it must be."""
    if part == "mooncake":
        try:
            import mooncake.store  # noqa: F401
        except ImportError as error:
            missing(part, str(error))
    elif not install_pooled.VERBS.exists():
        missing(part, f"there is no {install_pooled.INFINISTORE.name}")


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
            self.port, folder / "master.log", _LOOPBACK,
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
        self.owners.append(Process(command, ready, log, _LOOPBACK))
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
            port, folder / "infinistore.log", {"LD_PRELOAD": str(install_pooled.VERBS)},
        )  # fmt: skip


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
