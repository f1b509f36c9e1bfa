"""Proxies that others have written, unchanged, over two real servers with the connector."""

from __future__ import annotations

import contextlib
import subprocess
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from harness import pipeline, prompt, transfer
from launch import PYTHON, ROOT, environment
from serving import Server, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Reference

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(1800)]

LENGTHS = (1, 2, 31, 32, 33, 64, 65, 300, 500, 1024, 1100, 2500, 3900)
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
CHAT = "/v1/chat/completions"
HOST = "127.0.0.1"


class Proxied:
    """A prefiller and a decoder, and the port at which the first may serve."""

    def __init__(self, model: Path, logs: Path, folder: Path) -> None:
        self.at, self.folder, self.servers = free_port(), folder, list[Server]()
        self._model, self._logs = model, logs
        self._template = folder / "chat.jinja"
        self._template.write_text(TEMPLATE)

    def start(self, name: str, role: str, kv: dict[str, Any]) -> None:
        flags = {"chat-template": self._template}
        log = self._logs / f"{name}.log"
        self.servers.append(Server(self._model, kv | {"kv_role": role}, log, **flags))

    def hand_over(self) -> None:
        """The presets."""
        for preset, role, more in (
            ("prefiller", "kv_producer", {"serve.listen": f"127.0.0.1:{self.at}"}),
            ("decoder", "kv_consumer", {"handoff.wait": "60 s"}),
        ):
            disk = {
                "tiers.warm.path": str(self.folder / preset), "tiers.warm.capacity": "256 MiB",
                "tiers.warm.segment": "32 MiB",
            }  # fmt: skip
            self.start(preset, role, transfer(preset, **disk, **more))

    def share(self) -> None:
        """A folder."""
        kv = transfer(pipeline(cold={"use": "files", "path": str(self.folder / "kv")}))
        self.start("sharing-prefiller", "kv_producer", kv)
        self.start("sharing-decoder", "kv_consumer", kv)

    @property
    def ports(self) -> list[str]:
        return [str(server.port) for server in self.servers]


@pytest.fixture(scope="module", params=["hand_over", "share"])
def engines(
    llama: Path, logs: Path, tmp_path_factory: pytest.TempPathFactory, request: Any
) -> Iterator[Proxied]:
    made = Proxied(llama, logs, tmp_path_factory.mktemp("third-party"))
    try:
        getattr(made, request.param)()
        for server in made.servers:
            server.wait_ready()
        yield made
    finally:
        for server in made.servers:
            server.close()


def arguments(name: str, engines: Proxied) -> list[str]:
    p, d = engines.ports
    if name != "toy push":
        hosts = [w for f in ("host", "prefiller-host", "decoder-host") for w in (f"--{f}", HOST)]
        return [*hosts, "--prefiller-port", p, "--decoder-port", d]
    return [
        "--model", "tiny", "--prefill", f"{HOST}:{p}", "--decode", f"{HOST}:{d}",
        "--prefill-engine-id", "any", "--prefill-kv-host", HOST,
        "--prefill-side-channel-port", str(engines.at),
    ]  # fmt: skip


@contextlib.contextmanager
def proxied(name: str, engines: Proxied, log: Path) -> Iterator[httpx.Client]:
    from third_party import third_party_proxies

    try:
        file = third_party_proxies()[name]
    except OSError as error:
        pytest.skip(str(error))
    port = free_port()
    command = [str(PYTHON), str(file), "--port", str(port), *arguments(name, engines)]
    with log.open("ab") as out:
        child = subprocess.Popen(command, stdout=out, stderr=out, env=environment())
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=200, trust_env=False) as client:
            end = time.monotonic() + 60
            while child.poll() is None and time.monotonic() < end:
                with contextlib.suppress(httpx.TransportError):
                    client.get("/")
                    break
                time.sleep(0.1)
            yield client
    finally:
        child.terminate()
        child.wait(30)


def complete(client: httpx.Client, tokens: Any, **body: Any) -> tuple[list[Any], int]:
    """Greedy; the token ids of each choice, and how much of the prompts was not computed."""
    asked = {"model": "tiny", "prompt": tokens, "max_tokens": 8, "temperature": 0,
             "ignore_eos": True, "return_token_ids": True} | body  # fmt: skip
    said = client.post("/v1/completions", json=asked).raise_for_status().json()
    details = said["usage"].get("prompt_tokens_details") or {}
    return [c["token_ids"] for c in said["choices"]], details.get("cached_tokens") or 0


def chat(client: httpx.Client, text: str, **body: Any) -> tuple[str, int]:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 8,
             "temperature": 0, "ignore_eos": True} | body  # fmt: skip
    said = client.post(CHAT, json=asked).raise_for_status().json()
    details = said["usage"].get("prompt_tokens_details") or {}
    return said["choices"][0]["message"]["content"], details.get("cached_tokens") or 0


@pytest.fixture(autouse=True)
def _sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "adapters" / "proxy"))


@pytest.mark.parametrize("engines", ["hand_over"], indirect=True)
@pytest.mark.parametrize("name", ["toy", "toy push"])
def test_it_answers_as_one_engine_does(
    engines: Proxied, reference: Reference, logs: Path, name: str
) -> None:
    """`usage` says what the decoder has got, all but the last tokens, by either."""
    seed = 100 * len(name)
    with proxied(name, engines, logs / "third-party-proxy.log") as client:
        for n in LENGTHS:
            tokens = prompt(n, seed=seed + n)
            ids, cached = complete(client, tokens)
            assert ids == [reference(tokens, max_tokens=8)], n
            assert cached == (n - 1) // 32 * 32, n
        two = [prompt(n, seed=seed + 7 + n) for n in (400, 700)]
        assert complete(client, two)[0] == [reference(t, max_tokens=8) for t in two]
        text = " ".join(str(seed + i) for i in range(150))
        alone = f"http://127.0.0.1:{engines.servers[1].port}"
        with httpx.Client(base_url=alone, timeout=200, trust_env=False) as decoder:
            computed = chat(decoder, text, cache_salt="alone")
        said, cached = chat(client, text)
        assert (said, computed[1]) == (computed[0], 0)
        assert cached > 0
        body = {"model": "tiny", "prompt": prompt(600, seed=seed), "stream": True,
                "max_tokens": 8, "temperature": 0}  # fmt: skip
        with client.stream("POST", "/v1/completions", json=body) as answer:
            assert b"".join(answer.iter_raw()).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("engines", ["share"], indirect=True)
def test_one_that_hands_nothing_over(engines: Proxied, reference: Reference, logs: Path) -> None:
    """The one that vLLM has for LMCache: the decoder finds what the prefiller has stored."""
    with proxied("lmcache", engines, logs / "third-party-proxy.log") as client:
        for n in LENGTHS:
            tokens = prompt(n, seed=n)
            assert complete(client, tokens)[0] == [reference(tokens, max_tokens=8)], n
        end, found = time.monotonic() + 60, 0
        while found < 3840 and time.monotonic() < end:  # a store goes on after the answer
            ids, found = complete(client, prompt(3900, seed=3900))
            assert ids == [reference(prompt(3900, seed=3900), max_tokens=8)]
        assert found >= 3840
