"""A socket of each worker: for resets, which must happen at once, not with the next step, and for
its figures, whenever somebody asks.

An idle engine makes no steps. A worker listens on a socket whose name both sides know, in a folder
that only its user can enter; one line of JSON comes in, one goes out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger("tierloom.vllm")

_RESET = 10.0
"""Seconds that a worker may take to delete what it stores."""
_LINE = 8 << 20
"""Bytes of a question or an answer, at most."""


def address(vllm_config: Any, worker: int) -> str:
    """Where a worker of an engine listens."""
    engine = vllm_config.kv_transfer_config.engine_id  # the same in all of its processes
    copy = getattr(vllm_config.parallel_config, "data_parallel_index", 0)
    name = hashlib.sha256(f"{engine} {copy} {worker}".encode()).hexdigest()[:24]
    return f"{tempfile.gettempdir()}/tierloom-{os.getuid()}/{name}"


class ResetSocket:
    """Answers one request after another, in a separate thread, until it is closed."""

    def __init__(self, address: str, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """`answer` may raise: the caller gets the error. Raises OSError if it cannot listen."""
        self._address, self._answer = Path(address), answer
        _private(self._address.parent)
        self._address.unlink(missing_ok=True)  # of an engine of this name that was killed
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.bind(address)
            self._socket.listen(4)
        except OSError:
            self._socket.close()
            raise
        threading.Thread(target=self._serve, name="tierloom-reset", daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        with contextlib.suppress(OSError):  # wakes the thread that accepts
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._address.unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:  # closed
                return
            with caller:
                try:
                    caller.settimeout(5.0)
                    said = self._said(json.loads(_line(caller)))
                    caller.sendall(json.dumps(said).encode() + b"\n")
                except (OSError, ValueError) as error:
                    log.warning("a request at the reset socket was not understood: %s", error)

    def _said(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._answer(question)
        except Exception as error:
            log.exception("%s failed", question)
            return {"error": f"{type(error).__name__}: {error}"}


def ask(address: str, question: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The answer of a reset socket. Raises OSError, or ValueError if it is invalid."""
    with socket.socket(socket.AF_UNIX) as door:
        door.settimeout(seconds)
        door.connect(address)
        door.sendall(json.dumps(question).encode() + b"\n")
        return dict(json.loads(_line(door)))


def forget(vllm_config: Any, epoch: int, *, local: bool) -> bool:
    """Have all workers of an engine delete what they store, in their own tiers or in all, and store
    nothing that was planned before reset number `epoch`. False: not all of it is deleted."""
    workers = range(vllm_config.parallel_config.world_size)
    done = [_forgot(address(vllm_config, w), w, epoch, local=local) for w in workers]
    return all(done)


def _forgot(address: str, worker: int, epoch: int, *, local: bool) -> bool:
    try:
        said = ask(address, {"reset": epoch, "local": local}, _RESET)
    except (OSError, ValueError) as error:
        log.error("reset: worker %d does not answer: %s", worker, error)  # noqa: TRY400
        return False
    why = said.get("error") or ", ".join(said["refused"])
    if why:
        log.error("reset: worker %d: %s", worker, why)
        return False
    log.info("reset: worker %d deleted %d objects", worker, said["objects"])
    return True


def _line(peer: socket.socket) -> bytes:
    got = bytearray()
    while not got.endswith(b"\n"):
        more = peer.recv(1 << 16)
        if not more or len(got) > _LINE:
            raise ValueError("incomplete line")
        got += more
    return bytes(got)


def _private(folder: Path) -> None:
    """Make a folder that nobody else can enter. Raises OSError if it is another user's."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not private to this user: remove it")
