"""A process that drives a real engine, at the other end of two pipes; used for vLLM and SGLang.

One JSON object a line: `{"do": "start", ...}` goes in, `{"ok": ...}` or `{"error": traceback}`
comes out, in order.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class EngineError(AssertionError):
    """What an engine's process answered, or that it did not."""


def why_not(venv: Path) -> str | None:
    """Why this environment has no engine to test with, or None."""
    if (venv / ".ready").exists():
        return None
    failed = venv / "failed.txt"
    return failed.read_text().strip() if failed.exists() else "it is not installed"


def end_group(child: Any) -> None:
    """Kill a process that leads a session of its own, and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait(10)


def ends_of_logs(folder: Path, noise: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Name and last lines of the two logs of `folder` that were written last."""
    ends = []
    for log in sorted(folder.glob("*.log"), key=lambda f: f.stat().st_mtime)[-2:]:
        lines = log.read_text(errors="replace").splitlines()
        telling = [line for line in lines if not any(said in line for said in noise)]
        ends.append((log.name, "\n".join(telling[-50:])))
    return ends


class DriverProcess:
    """One such process; what it says beside its answers goes to `log`.

    `begin(folder, out, fds)` starts it: with TMPDIR=folder, its output to the file `out`, and with
    the descriptors `fds`, which it reads commands from and writes answers to.
    """

    def __init__(self, log: Path, begin: Callable[[str, IO[Any], tuple[int, int]], Any]) -> None:
        self.log = log
        self._tmp = tempfile.mkdtemp(prefix="engine-")  # engines leave sockets and files behind
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        with log.open("ab") as out:
            self._child = begin(self._tmp, out, (commands, answers))
        os.close(commands)
        os.close(answers)
        self._buffer = b""
        self.alive = True

    @property
    def pid(self) -> int:
        return int(self._child.pid)

    def ask(self, do: str, *, timeout: float = 110.0, **arguments: Any) -> Any:
        """What `Driver.do(**arguments)` gives; EngineError when it raises or does not answer."""
        if not self.alive:
            raise EngineError(f"{do}: the engine's process has ended; see {self.log}")
        os.write(self._write, json.dumps({"do": do, **arguments}).encode() + b"\n")
        return self.answer(do, timeout)

    def answer(self, do: str, timeout: float) -> Any:
        """The next answer, to whatever was asked."""
        answer = json.loads(self._line(do, time.monotonic() + timeout))
        if "error" in answer:
            raise EngineError(f"{do}: {answer['error'].strip().splitlines()[-1]}; see {self.log}")
        return answer["ok"]

    def _line(self, do: str, end: float) -> bytes:
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            some = os.read(self._read, 1 << 16) if ready else b""
            if not some:
                what = "ended" if ready else "does not answer"
                self.kill()
                raise EngineError(f"{do}: the engine's process {what}; see {self.log}")
            self._buffer += some
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def close(self) -> None:
        """Let it end by itself, as a server does on SIGTERM; kill it if it does not."""
        if self.alive:
            os.close(self._write)
            self._write = -1
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(20)
        self.kill()

    def kill(self) -> None:
        """End it now, with all its children, as a power cut would."""
        if not self.alive:
            return
        self.alive = False
        end_group(self._child)
        shutil.rmtree(self._tmp, ignore_errors=True)
        os.close(self._read)
        if self._write >= 0:
            os.close(self._write)
