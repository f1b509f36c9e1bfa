"""Clients that send what no engine should see, slowly, too much of it, or half."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from proxy_rig import TEXT, Rig

CASES = int(os.environ.get("TIERLOOM_CASES", "35"))
PATHS = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"]
SAID = {"message", "type", "param", "code"}


def refused(answer: Any, status: int, *words: str) -> None:
    assert answer.status_code == status
    assert answer.json()["error"].keys() == SAID
    assert answer.json()["error"]["code"] == status
    assert all(word in answer.json()["error"]["message"] for word in words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "but a list"),
        (b"null", "but a NoneType"),
        (b'{"a": 1}}', "not JSON"),
        (b"\xff\xfe{\x00}\x00", "UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"[" * 100000, "nested too deeply"),
        (b'{"a":' * 100000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_what_is_no_object(rig: Rig, body, words) -> None:
    for path in PATHS[:3]:
        refused(rig.client.post(path, content=body), 400, path, words, "send an object")
    assert not rig.seen("decode")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)  # fmt: skip
FIELDS = [
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "n", "best_of", "stream",
    "stream_options", "tools", "kv_transfer_params", "prompt_embeds", "use_beam_search", "input",
    "prompt_logprobs", "echo", "logprobs", "min_tokens",
]  # fmt: skip
BODIES = st.dictionaries(st.sampled_from(FIELDS), JSON | st.just(TEXT), max_size=8)


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(PATHS[:2]), BODIES, st.sampled_from(["stub", "x", None]))
def test_any_body_has_an_answer_and_comes_through(rig: Rig, path, body, model) -> None:
    """The decoders of this test answer whatever they are asked."""
    for engine in rig.stubs:
        engine.seen.clear()
        engine.faults = [422]
    if model:
        body = {**body, "model": model}
    refused(rig.post(path, body), 422, "as told")
    told = rig.seen("decode")[0]
    told.pop("headers")
    params, sent = told.pop("kv_transfer_params", None), {**body}
    own = sent.pop("kv_transfer_params", None)
    assert json.dumps(told, sort_keys=True) == json.dumps(sent, sort_keys=True)
    if isinstance(own, dict):
        left = {k: v for k, v in own.items() if not k.startswith(("remote_", "do_remote_"))}
        assert left.items() <= (params or {}).items() or "transfer_id" in left


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(PATHS), st.binary(max_size=200) | st.text().map(str.encode))
def test_any_bytes_have_an_answer(rig: Rig, path, body) -> None:
    answer = rig.client.post(path, content=body)
    assert answer.status_code in (400, 404, 422) or path.endswith(("responses", "embeddings"))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/completions", 405), ("GET", "/", 404), ("POST", "/sleep", 404),
     ("POST", "/reset_prefix_cache", 404), ("DELETE", "/v1/models", 405),
     ("GET", "/v1//models", 404), ("POST", "/v1/load_lora_adapter", 404)],
)  # fmt: skip
def test_other_paths_are_not_passed(rig: Rig, method, path, status) -> None:
    refused(rig.client.request(method, path), status, "not a path of the proxy")


def test_a_body_of_more_than_64_mib(rig: Rig) -> None:
    length = (64 << 20) + 1
    said = say(
        rig, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % length
    )
    assert b" 413 " in said
    assert b"more than 67108864 bytes" in said

    def chunks() -> Any:
        for _ in range(65):
            yield b" " * (1 << 20)

    with contextlib.suppress(httpx.WriteError):  # it was cut while it still sent
        refused(rig.client.post("/v1/completions", content=chunks()), 413)


def test_a_body_of_many_images(rig: Rig) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * (8 << 20)}}
    said = [{"role": "user", "content": [{"type": "text", "text": "x"}, image]}]
    body = {"model": "stub", "messages": said}
    assert rig.post("/v1/chat/completions", body).status_code == 200
    assert rig.seen("decode")[0]["messages"] == said


def say(rig: Rig, *pieces: bytes, wait: float = 0.0, half: bool = False) -> bytes:
    """What comes back until the proxy hangs up."""
    with socket.create_connection(("127.0.0.1", rig.threads.ports[0]), timeout=20) as sock:
        for piece in pieces:
            sock.sendall(piece)
            time.sleep(wait)
        if half:
            sock.shutdown(socket.SHUT_WR)
        got = b""
        while piece := sock.recv(1 << 16):
            got += piece
        return got


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"


@pytest.mark.parametrize("rig", [{"body_wait": 0.6}], indirect=True)
def test_a_slow_client(rig: Rig) -> None:
    body = json.dumps({"model": "stub", "prompt": "x"}).encode()
    slow = [
        HEAD + b"content-length: %d\r\n\r\n" % len(body),
        *(body[i : i + 8] for i in range(0, 40, 8)),
    ]
    assert b" 200 " in say(rig, *slow, wait=0.02)
    said = say(rig, HEAD + b"content-length: %d\r\n\r\n" % len(body), body[:5])
    assert b" 408 " in said
    assert b"did not come in 0.6 s" in said


def test_a_client_that_leaves_in_its_body_or_closes_its_side(rig: Rig) -> None:
    say(rig, HEAD + b"content-length: 100\r\n\r\n{", half=True)
    for engine in rig.decoders:
        engine.faults = [5.0]
    body = json.dumps({"model": "stub", "prompt": "x"}).encode()
    say(rig, HEAD + b"content-length: %d\r\n\r\n" % len(body) + body, wait=0.2, half=True)
    rig.until(lambda: rig.metric("gone_total") == 2)
    rig.until(lambda: sum(len(e.aborted) for e in rig.decoders) == 1)


@pytest.mark.parametrize("rig", [{"token": b"secret"}], indirect=True)
def test_engines_are_changed_with_the_token_alone(rig: Rig) -> None:
    order = {"url": "http://127.0.0.1:1/v1", "role": "decode"}
    path = "/v1/proxy/engines"
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        refused(rig.post(path, order, headers), 401, "Authorization: Bearer")
        assert rig.client.get(path, headers=headers).status_code == 401
    allowed = {"Authorization": "Bearer secret"}
    plain = {**allowed, "content-type": "text/plain"}
    refused(rig.client.post(path, content=json.dumps(order), headers=plain), 415)
    bad = [{"action": "x"}, {"role": "x"}, {"url": 3}, {"url": "ftp://x"}, {"url": None}]
    bad += [{"action": "drain"}, {"url": "http://a:b@c:1"}, {"url": "http://x:99999"}, {"url": ""}]
    for each in bad:
        refused(rig.post(path, {**order, **each}, allowed), 400, path)
    assert len(rig.post(path, order, allowed).json()["engines"]) == 5
    refused(rig.post(path, order, allowed), 400, "is there already")
    shown = rig.post(path, {**order, "action": "remove"}, allowed).json()["engines"]
    assert shown[0] == {
        "url": f"http://127.0.0.1:{rig.stubs[0].port}", "role": "prefill", "up": True,
        "draining": False, "requests": 0, "queued_tokens": 0,
    }  # fmt: skip
    assert rig.ask("x").status_code == 200  # that needs no token
