"""Starts processes that run vLLM: forked from one that has imported it, or afresh.

Nothing here imports vLLM: it lives in `.venv-vllm`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import IO, Any

from driver_process import end_group

ROOT = Path(__file__).resolve().parents[3]
VENV = ROOT / ".venv-vllm"
PYTHON = VENV / "bin" / "python"
SERVER = Path(__file__).with_name("fork_server.py")

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    # Not beside the source: vLLM's numba is another one, and each would compile all anew.
    "NUMBA_CACHE_DIR": str(VENV / "numba"),
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",  # engines run eagerly; some helpers of vLLM would be compiled
    "PYTHONSAFEPATH": "1",  # the checkout and this folder must not pass for packages
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # asks workers in other processes for their report
    # Whatever HOME is: a class of models that it does not know there is looked at in a process of
    # its own, which imports vLLM again.
    "VLLM_CACHE_ROOT": str(VENV / "cache"),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # pinned threads starve each other on a shared machine
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}
_OURS = ("TIERLOOM_", "VLLM_")  # settings of whoever runs the tests, which are not for the engines
_LATE = ("HOME", "TIERLOOM_", "TMPDIR", "VLLM_ENABLE_V1_MULTIPROCESSING", "XDG_CACHE_HOME")
"""A fork may have others of these than who imported vLLM: what reads them is imported later, or is
about downloads, of which there are none."""

_SURROUNDINGS = {k: v for k, v in os.environ.items() if not k.startswith(_OURS)}
"""Taken once: torch, which tests import into their own process, sets variables."""


def environment(**more: str) -> dict[str, str]:
    """What an engine's process is to see of the environment."""
    return _SURROUNDINGS | ENVIRONMENT | more


def start(
    run: Path | str, *arguments: str, env: dict[str, str], out: IO[Any], err: IO[Any], cwd: Path,
    fds: tuple[int, ...] = (),
) -> Forked | subprocess.Popen[bytes]:  # fmt: skip
    """Run a file, or a module when it is a string; `fds` are its last arguments.

    It leads a session of its own and reads nothing. Forked if its environment is
    that of the fork server in all that vLLM's import reads; else from a new interpreter.
    """
    server = _fork_server()
    if server.env == _read_early(env):
        order = {
            "run": str(run),
            "module": isinstance(run, str),
            "arguments": arguments,
            "env": env,
        }
        return server.fork(order | {"cwd": str(cwd)}, [out.fileno(), err.fileno(), *fds])
    target = [str(run)] if isinstance(run, Path) else ["-m", run]
    return subprocess.Popen(
        ["nice", str(PYTHON), *target, *arguments, *map(str, fds)],
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        pass_fds=fds,
        cwd=cwd,
        env=env,
        start_new_session=True,  # its own processes end with it
    )


def finish(
    script: Path, *arguments: str, timeout: float, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = start(script, *arguments, env=environment(**env), out=out, err=err, cwd=ROOT)
        try:
            status = child.wait(timeout)
        finally:
            end_group(child)
        return subprocess.CompletedProcess(arguments, status, _text(out), _text(err))


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _read_early(env: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in env.items() if not k.startswith(_LATE)}


class Forked:
    """A process that the fork server has made; as much of `Popen` as is used."""

    def __init__(self, server: ForkServer, pid: int, alive: int) -> None:
        self.pid = pid
        self._server, self._alive = server, alive
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Its exit status; TimeoutExpired when it has not ended by then."""
        if self.returncode is None:
            if not select.select([self._alive], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self.returncode = self._server.reap(self.pid)
            os.close(self._alive)
        return self.returncode


class ForkServer:
    """`fork_server.py`, from the first process that is started until `close`.

    What it has forked ends with it, and it with the process that runs the tests.
    """

    def __init__(self) -> None:
        env = environment()
        self.env = _read_early(env)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._child = subprocess.Popen(
            ["nice", str(PYTHON), str(SERVER), str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._said,
            pass_fds=[theirs.fileno()],
            env=env,
            start_new_session=True,
        )
        theirs.close()

    def fork(self, order: dict[str, Any], fds: list[int]) -> Forked:
        socket.send_fds(self._control, [json.dumps(order).encode()], fds)
        said, alive, _, _ = socket.recv_fds(self._control, 1 << 10, 1)
        if not said:
            raise RuntimeError(f"the fork server has ended: {_text(self._said)}")
        return Forked(self, json.loads(said), alive[0])

    def reap(self, pid: int) -> int:
        self._control.send(json.dumps({"reap": pid}).encode())
        return int(json.loads(self._control.recv(1 << 10)))

    def close(self) -> None:
        self._control.close()
        self._child.wait(30)
        self._said.close()


_running: list[ForkServer] = []


def _fork_server() -> ForkServer:
    if not _running:
        _running.append(ForkServer())
    return _running[0]


def close() -> None:
    """End the fork server, if there is one."""
    while _running:
        _running.pop().close()
