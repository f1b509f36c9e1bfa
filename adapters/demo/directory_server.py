"""A Redis or Valkey of the demo's own, for as long as it runs."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tierloom.adapters.demo.engine_server import HOST, free_port
from tierloom.stages.errors import TierloomError

READY_S, END_S = 10.0, 10.0
"""Seconds that it may take to listen, and to end."""


def redis_binary() -> str | None:
    """What is installed of Redis and Valkey."""
    return shutil.which("redis-server") or shutil.which("valkey-server")


@contextlib.contextmanager
def own_directory(binary: str, folder: Path, log: Path) -> Iterator[str]:
    """Its URL. It keeps nothing on disk, and is stopped on leaving whatever happens.

    Raises TierloomError when it does not start.
    """
    port = free_port()
    command = [binary, "--bind", HOST, "--port", str(port), "--save", "", "--dir", str(folder)]
    with log.open("ab") as out:
        # a group of its own: Ctrl-C comes to us, who then stop it
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    try:
        _wait_for(process, port)
        yield f"redis://{HOST}:{port}/0"
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), 1):
            return
        time.sleep(0.02)
    raise TierloomError(f"{process.args[0]!s} did not start")  # type: ignore[index]
