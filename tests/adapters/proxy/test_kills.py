"""Engines, each a process, are killed, stopped and started again while clients ask."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from proxy_rig import TEXT, Rig
from stub_engine import completion, event

ROUNDS = int(os.environ.get("TIERLOOM_CASES", "40"))
STUB = Path(__file__).with_name("stub_engine.py")


class StubProcess:
    """One engine on one port, whoever runs it."""

    def __init__(self) -> None:
        self.port = 0
        self.start()

    def start(self) -> None:
        words = [sys.executable, str(STUB), "1", "0.01", str(self.port)]
        self.child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.child.stdout is not None
        self.port = int(self.child.stdout.readline())

    def end(self) -> None:
        self.child.kill()
        self.child.communicate(timeout=20)


class Clients:
    """Each asks one request after another and looks at every answer."""

    def __init__(self, rig: Rig) -> None:
        self.url, self.done, self.broken = rig.url, 0, 0
        self.wrong: list[object] = []
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(4)]

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=30, trust_env=False) as client:
            while not self.ended.is_set():
                body = {"model": "stub", "prompt": f"{number} {self.done} {TEXT}", "max_tokens": 9}
                try:
                    (self._streamed if self.done % 2 else self._whole)(client, body)
                except Exception as error:
                    self.wrong.append(error)
                self.done += 1

    def _whole(self, client: httpx.Client, body: dict[str, object]) -> None:
        answer = client.post("/v1/completions", json=body)
        if answer.json() != completion(body):
            self.wrong.append(answer.text)

    def _streamed(self, client: httpx.Client, body: dict[str, object]) -> None:
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        got = b""
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            client.stream("POST", "/v1/completions", json=body) as answer,
        ):
            for piece in answer.iter_raw():
                got += piece
        if b'"error"' in got and b"[DONE]" not in got:
            self.broken += 1
        elif not got.endswith(event({**completion(body), "choices": []}) + b"data: [DONE]\n\n"):
            self.wrong.append(got)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("rig", [{"prefill_wait": 20.0}], indirect=True)
def test_every_request_is_answered(rig: Rig) -> None:
    """A stream breaks only where a decoder was killed or stopped; one of each role is always up."""
    engines = [StubProcess() for _ in range(4)]
    clients, hurt = Clients(rig), 0
    draw = random.Random(1)
    try:
        rig.swap("prefill", *(e.port for e in engines[:2]))
        rig.swap("decode", *(e.port for e in engines[2:]))
        for thread in clients.threads:
            thread.start()
        for _ in range(ROUNDS):
            which = draw.randrange(4)
            hurt += which >= 2
            if draw.random() < 0.5:
                engines[which].end()
                time.sleep(draw.random())
                engines[which].start()
            else:
                engines[which].child.send_signal(signal.SIGSTOP)
                time.sleep(draw.random() * 2)
                engines[which].child.send_signal(signal.SIGCONT)
            rig.until(lambda: rig.metric("engine_up") == 4)
        rig.until(lambda: clients.done > ROUNDS)
    finally:
        clients.ended.set()
        for thread in clients.threads:
            thread.join(60)
        for engine in engines:
            engine.end()
    print(f"{ROUNDS} rounds, {clients.done} requests, {clients.broken} streams broken")
    assert not clients.wrong
    assert clients.broken <= 4 * hurt
