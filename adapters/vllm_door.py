"""A worker's door: what the scheduler's side must have done at once, not with the next step.

An idle engine makes no steps. A worker listens on a socket in a folder that only its user can
enter; one line of JSON comes in, one goes out.
"""

from __future__ import annotations

import json
import logging
import shutil
import socket
import tempfile
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("tierloom.vllm")

_LINE = 1 << 16
"""Bytes of a question or an answer, at most."""


class Door:
    """Answers one question after another, in a thread of its own, until it is closed."""

    def __init__(self, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """`answer` may raise: the asker is told. Raises OSError where there can be no door."""
        self._answer = answer
        self._folder = tempfile.mkdtemp(prefix="tierloom-")  # mode 0700
        self.address = f"{self._folder}/door"
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.bind(self.address)
            self._socket.listen(4)
        except OSError:
            self.close()
            raise
        threading.Thread(target=self._serve, name="tierloom-door", daemon=True).start()

    def close(self) -> None:
        """Nobody is answered any more."""
        self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)

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
                    log.warning("a question at the door was not understood: %s", error)

    def _said(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._answer(question)
        except Exception as error:
            log.exception("%s failed", question)
            return {"error": f"{type(error).__name__}: {error}"}


def ask(address: str, question: dict[str, Any], seconds: float) -> dict[str, Any]:
    """A door's answer. Raises OSError, or ValueError where it is none."""
    with socket.socket(socket.AF_UNIX) as door:
        door.settimeout(seconds)
        door.connect(address)
        door.sendall(json.dumps(question).encode() + b"\n")
        return dict(json.loads(_line(door)))


def _line(peer: socket.socket) -> bytes:
    got = b""
    while not got.endswith(b"\n"):
        more = peer.recv(4096)
        if not more or len(got) > _LINE:
            raise ValueError("the other end said no whole line")
        got += more
    return got
