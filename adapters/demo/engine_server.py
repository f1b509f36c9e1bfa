"""An engine's OpenAI-compatible server on this machine: started, asked, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from tierloom.adapters.demo.screen import Answer
from tierloom.adapters.demo.smollm2 import NAME
from tierloom.stages.errors import TierloomError

HOST = "127.0.0.1"
START_S, ANSWER_S, STOP_S, REST_S = 600.0, 600.0, 60.0, 10.0
"""Seconds the server may take to start, to send the next part of an answer, and to end; and how
much longer the engine that it started may take."""


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as s:
        s.bind((HOST, 0))
        return int(s.getsockname()[1])


class EngineServer:
    """One server on a free port of this machine, stopped on leaving whatever happens."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """`command` wants only the host and the port; it is to call its model `NAME`."""
        self.log = log
        self.port = free_port()
        self._command = [*command, "--host", HOST, "--port", str(self.port)]
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> EngineServer:
        with self.log.open("ab") as log:
            # a group of its own: Ctrl-C comes to us, who then stop it in order
            self._process = subprocess.Popen(
                self._command, cwd=self.log.parent, env={**os.environ, **self._environment},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def runs(self) -> bool:
        """It was started, and not ended by us."""
        return self._process is not None

    def stop(self) -> None:
        """End it in order; what is left of it after that is killed."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.terminate()
            process.wait(STOP_S)
            end = time.monotonic() + REST_S
            while _group_lives(process.pid) and time.monotonic() < end:
                time.sleep(0.1)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def kill(self) -> None:
        """End it, and what it started, as a machine ends that fails."""
        process, self._process = self._process, None
        if process is not None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def wait_ready(self) -> None:
        """Return when it serves. Raises TierloomError when it ended, or takes too long."""
        assert self._process is not None
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            if (status := self._process.poll()) is not None:
                raise TierloomError(f"the server ended with status {status} while it started")
            with contextlib.suppress(OSError, HTTPException):
                if self.send("GET", "/health") == 200:
                    return
            time.sleep(0.25)
        raise TierloomError(f"the server did not start within {START_S:.0f} s")

    def warm_up(self, more: Mapping[str, Any]) -> None:
        """One short request, of which nothing is shown. `more` as in `ask`."""
        self.ask(" ".join(str(i) for i in range(150)), 2, more, lambda _: None)

    def ask(
        self, text: str, most: int, more: Mapping[str, Any], said: Callable[[str], None]
    ) -> Answer:
        """Send `text` as a chat and stream the answer, greedy, of `most` tokens at most.

        `more` goes into the request's body; `said` is given each piece of text. Raises
        TierloomError when the server refuses it or goes away.
        """
        body = {
            "model": NAME, "messages": [{"role": "user", "content": text}],
            "max_tokens": most, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, **more,
        }  # fmt: skip
        connection = HTTPConnection(HOST, self.port, timeout=ANSWER_S)
        pieces: list[str] = []
        first = 0.0
        usage: dict[str, Any] = {}
        try:
            sent = time.perf_counter()
            connection.request(
                "POST", "/v1/chat/completions", json.dumps(body),
                {"Content-Type": "application/json"},
            )  # fmt: skip
            for event in _events(connection.getresponse()):
                usage = event.get("usage") or usage
                for choice in event.get("choices", ()):
                    if piece := choice["delta"].get("content"):
                        first = first or time.perf_counter() - sent
                        pieces.append(piece)
                        said(piece)
            whole = time.perf_counter() - sent
        except (OSError, HTTPException) as e:
            raise TierloomError(f"the server went away: {e!r}") from e
        finally:
            connection.close()
        if not usage:
            raise TierloomError("the server's answer ended early")
        hit = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Answer("".join(pieces), first or whole, usage["prompt_tokens"], hit)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer to JSON, which is JSON. Raises TierloomError when it is refused, or the server
        goes away."""
        connection = HTTPConnection(HOST, self.port, timeout=ANSWER_S)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
        except (OSError, HTTPException) as e:
            raise TierloomError(f"the server went away: {e!r}") from e
        finally:
            connection.close()
        if response.status != 200:
            said = text[:2000].decode(errors="replace")
            raise TierloomError(f"the server refused a request ({response.status}): {said}")
        return json.loads(text)

    def send(self, method: str, path: str) -> int:
        """The status of an answer to an empty request."""
        connection = HTTPConnection(HOST, self.port, timeout=5)
        try:
            connection.request(method, path)
            return connection.getresponse().status
        finally:
            connection.close()


def _events(response: Any) -> Iterator[dict[str, Any]]:
    """The events of a streamed answer. Raises TierloomError when it is an error."""
    if response.status != 200:
        text = response.read(2000).decode(errors="replace")
        raise TierloomError(f"the server refused a request ({response.status}): {text}")
    for line in response:
        data = line.strip().removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        if data and line.startswith(b"data:"):
            event = json.loads(data)
            if "error" in event:
                raise TierloomError(f"the server failed: {event['error']}")
            yield event


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
