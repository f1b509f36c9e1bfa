"""Proxies that others have written, unchanged, over two real servers with the connector."""

from __future__ import annotations

import contextlib
import json
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
LMCACHE = {
    "__init__.py": "", "v1/__init__.py": "", "v1/storage_backend/__init__.py": "",
    "logging.py": "from logging import getLogger as init_logger  # noqa: F401\n",
    "v1/storage_backend/pd_backend.py":
        "import msgspec\n\n\nclass ProxyNotif(msgspec.Struct, tag=True):\n    req_id: str\n\n\n"
        "PDMsg = ProxyNotif\n",
}  # fmt: skip
"""What LMCache's proxy imports of LMCache, which takes CUDA to be installed: a logger, and the note
as msgspec reads it."""


class Proxied:
    """A prefiller and a decoder, and the port at which the first may serve."""

    def __init__(self, model: Path, logs: Path, folder: Path) -> None:
        self.at, self.folder, self.servers = free_port(), folder, list[Server]()
        self.notes = free_port()
        self.model, self._logs = model, logs
        self._template = folder / "chat.jinja"
        self._template.write_text(TEMPLATE)

    def start(self, name: str, role: str, kv: dict[str, Any]) -> None:
        flags = {"chat-template": self._template}
        log = self._logs / f"{name}.log"
        self.servers.append(Server(self.model, kv | {"kv_role": role}, log, **flags))

    def hand_over(self) -> None:
        """The presets."""
        self._present({"serve.listen": f"{HOST}:{self.at}"}, {"handoff.wait": "60 s"})

    def tell(self) -> None:
        """The prefiller opens, and tells the proxy."""
        at = {"handoff.peers": [HOST], "handoff.proxy": f"{HOST}:{self.notes}"}
        takes = {"serve.listen": f"{HOST}:{self.at}", "serve.tiers": ["hot"]}
        wait = {"handoff.wait": "20 s"}
        self._present(at | wait, takes | wait | {"handoff.offers": True})

    def _present(self, prefiller: dict[str, Any], decoder: dict[str, Any]) -> None:
        for preset, role, more in (
            ("prefiller", "kv_producer", prefiller), ("decoder", "kv_consumer", decoder),
        ):  # fmt: skip
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
        more = []
        if name == "told":
            more = ["--decoder-init-port", str(engines.at), "--proxy-host", HOST,
                    "--proxy-port", str(engines.notes), "--model", str(engines.model)]  # fmt: skip
        hosts = [w for f in ("host", "prefiller-host", "decoder-host") for w in (f"--{f}", HOST)]
        return [*hosts, "--prefiller-port", p, "--decoder-port", d, *more]
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
        child = subprocess.Popen(command, stdout=out, stderr=out, env=_imports(name, engines))
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


def _imports(name: str, engines: Proxied) -> dict[str, str]:
    """The environment of a proxy."""
    env = environment()
    if name != "told" or not subprocess.run(
        [str(PYTHON), "-c", "import lmcache.v1.storage_backend.pd_backend"],
        env=env, capture_output=True, timeout=60, check=False,
    ).returncode:  # fmt: skip
        return env
    for path, text in LMCACHE.items():
        file = engines.folder / "imports" / "lmcache" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return env | {"PYTHONPATH": str(engines.folder / "imports")}


def streamed(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a greedy answer."""
    asked = {"model": "tiny", "max_tokens": 8, "temperature": 0, "ignore_eos": True,
             "stream_options": {"include_usage": True}} | body  # fmt: skip
    events = client.post(path, json=asked).raise_for_status().text.split("\n\n")
    assert [event for event in events if event][-1] == "data: [DONE]"
    return [json.loads(event[6:]) for event in events if event and not event.endswith("[DONE]")]


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


@pytest.mark.parametrize("engines", ["tell"], indirect=True)
def test_one_that_tells_the_prefiller_of_the_decoder(
    engines: Proxied, reference: Reference, logs: Path
) -> None:
    """LMCache's: the prefiller says the first token, and the decoder has all of the prompt."""
    decoder = httpx.Client(
        base_url=f"http://{HOST}:{engines.ports[1]}", timeout=200, trust_env=False
    )
    with proxied("told", engines, logs / "third-party-proxy.log") as client, decoder:
        for n in (1, 2, 10, 40, 150, 600, 900):
            text = " ".join(str(7000 + n + i) for i in range(n))
            tokens = decoder.post("/tokenize", json={"prompt": text}).json()["tokens"]
            first, *rest = streamed(
                client, "/v1/completions", prompt=text, max_tokens=9, return_token_ids=True
            )
            ids = [i for event in rest for c in event["choices"] for i in c["token_ids"] or ()]
            assert ids == reference(tokens, max_tokens=9)[1:], n
            used = rest[-1]["usage"]["prompt_tokens_details"] or {}
            assert (used.get("cached_tokens") or 0) == len(tokens) // 32 * 32, len(tokens)
            assert first["choices"][0]["text"]
        said = {"messages": [{"role": "user", "content": " ".join(map(str, range(300)))}]}
        events = streamed(client, CHAT, **said)
        deltas = [c.get("delta", c) for event in events for c in event["choices"]]
        alone = {"model": "tiny", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        whole = decoder.post(CHAT, json=said | alone | {"cache_salt": "alone"}).json()
        text = "".join(delta.get("content") or delta.get("text") or "" for delta in deltas)
        assert text == whole["choices"][0]["message"]["content"]


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
