"""Engines that refuse, fail, lie or say nothing: a client gets its answer all the same."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from proxy_rig import TEXT, RawServer, Rig
from stub_engine import completion

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
WRONG = {
    "nothing": (),
    "not HTTP": (b"SSH-2.0-x\r\n\r\n",),
    "half a header": (b"HTTP/1.1 200 OK\r\nconte",),
    "a header that is none": (b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n",),
    "a folded header": (b"HTTP/1.1 200 OK\r\na: b\r\n c: d\r\n\r\n",),
    "a line break in a header": (b"HTTP/1.1 200 OK\r\na: b\nc: d\r\n\r\n",),
    "headers without an end": (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 30000,),
    "half a body": (HEAD + b"content-length: 100\r\n\r\n{",),
    "two lengths": (HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",),
    "a length that is none": (HEAD + b"content-length: -2\r\n\r\n{}",),
    "a coding that is unknown": (HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n{}",),
    "no first chunk": (HEAD + b"transfer-encoding: chunked\r\n\r\n",),
    "a chunk's length that is none": (HEAD + b"transfer-encoding: chunked\r\n\r\n", b"-1\r\n{}"),
    "a chunk too long": (HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\n{}}}",),
}


def right(rig: Rig, before: str = "") -> None:
    """`before`: what makes a prompt of it that nobody has had."""
    answer = rig.ask(before + TEXT, max_tokens=4)
    wanted = completion({"prompt": before + TEXT, "max_tokens": 4})
    assert (answer.status_code, answer.json()) == (200, wanted)


@pytest.mark.parametrize("said", WRONG.values(), ids=WRONG)
def test_garbage_of_a_prefiller_or_a_decoder(rig: Rig, said) -> None:
    with RawServer(*said) as bad:
        rig.swap("prefill", bad.port, rig.prefillers[0].port)
        right(rig)
        rig.swap("prefill", bad.port)
        right(rig, "2")  # the decoder computes
        assert bad.taken == 2
        rig.swap("prefill")
        rig.swap("decode", bad.port, rig.decoders[0].port)
        right(rig, "3")
        assert bad.taken == 3
        rig.swap("decode", bad.port)
        answer = rig.ask(max_tokens=4)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, 502)
        assert f"127.0.0.1:{bad.port} " in answer.json()["error"]["message"]


@pytest.mark.parametrize("fault", [500, 503, 400, 404, 429, "garbage", "no params"])
def test_a_prefiller_that_does_not_hand_over(rig: Rig, fault) -> None:
    for engine in rig.prefillers:
        engine.faults = [fault] * 2
    right(rig)
    (told,) = rig.seen("decode")
    assert "kv_transfer_params" not in told
    if isinstance(fault, int) and fault < 500:
        assert rig.metric('handoffs_total{outcome="refused"}') == 1
    assert len(rig.seen("prefill")) == (2 if fault in (500, 503, "garbage") else 1)


def test_another_prefiller_hands_over(rig: Rig) -> None:
    rig.prefillers[0].faults = [500]
    right(rig)
    assert rig.metric('retries_total{role="prefill"}') == 1
    (told,) = rig.seen("decode")
    assert told["kv_transfer_params"]["remote_engine_id"] == f"engine-{rig.prefillers[1].port}"


@pytest.mark.parametrize("fault", [500, 503])
def test_another_decoder_has_the_prefillers_params(rig: Rig, fault) -> None:
    for engine in rig.decoders:
        engine.faults = [fault]
    right_one = rig.ask(max_tokens=4)
    assert right_one.status_code == fault  # nobody is left: the last one's own words
    assert right_one.json()["error"]["message"] == f"as told: {fault}"
    one, other = rig.seen("decode")
    assert one["kv_transfer_params"] == other["kv_transfer_params"]
    assert len(rig.seen("prefill")) == 1
    right(rig)


@pytest.mark.parametrize("fault", [400, 401, 404, 422, 429])
def test_what_a_decoder_refuses_is_passed_on(rig: Rig, fault) -> None:
    for engine in rig.decoders:
        engine.faults = [fault]
    answer = rig.ask("short")
    assert (answer.status_code, answer.json()["error"]["code"]) == (fault, fault)
    assert len(rig.seen("decode")) == 1


def test_an_unknown_model_is_the_decoders_answer(rig: Rig) -> None:
    answer = rig.ask(model="other")
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, "no such model")


def test_a_broken_stream_looks_broken(rig: Rig) -> None:
    for engine in rig.decoders:
        engine.faults = ["half"]
    body = {"model": "stub", "prompt": TEXT, "max_tokens": 6, "stream": True}
    with rig.client.stream("POST", "/v1/completions", json=body) as answer:
        got = broken(answer.iter_raw())
    assert got.count(b"text_completion") == 3
    assert b'data: {"error": {"message": "/v1/completions: http://127.0.0.1:' in got
    assert b"[DONE]" not in got
    assert rig.metric("broken_streams_total") == 1
    right(rig)


def broken(pieces: Iterator[bytes]) -> bytes:
    """What comes until the connection ends, which it does too early."""
    got = b""
    with contextlib.suppress(httpx.RemoteProtocolError):
        for piece in pieces:
            got += piece
        pytest.fail("the answer has an end")
    return got


def process(count: int, pace: float = 0.0) -> tuple[subprocess.Popen[str], list[int]]:
    script = Path(__file__).with_name("stub_engine.py")
    child = subprocess.Popen(
        [sys.executable, str(script), str(count), str(pace)], stdout=subprocess.PIPE, text=True
    )
    return child, [int(port) for port in child.stdout.readline().split()]


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_dies_or_stops_under_a_request(rig: Rig, sent, monkeypatch) -> None:
    """One process is a prefiller and a decoder, beside a decoder that is well."""
    monkeypatch.setattr("tierloom.adapters.proxy.fleet._LOST", 3)
    child, (prefill, decode) = process(2, pace=0.1)
    try:
        rig.swap("prefill", prefill)
        rig.swap("decode", decode, rig.decoders[0].port)
        with rig.client.stream(
            "POST", "/v1/completions", json={"model": "stub", "prompt": TEXT, "stream": True}
        ) as answer:
            assert b"data: {" in next(pieces := answer.iter_raw())
            os.kill(child.pid, sent)
            assert b"send the request again" in broken(pieces)
        for seat in rig.parts.fleet.seats:
            seat.answered()  # nobody knows yet
        right(rig, "2")
    finally:
        child.kill()
        child.wait(10)
        child.stdout.close()


def test_an_engine_that_says_nothing_is_found_out(rig: Rig, monkeypatch) -> None:
    with RawServer(hang=True) as silent:
        rig.swap("prefill", silent.port)
        right(rig)
        rig.swap("decode", silent.port, rig.decoders[0].port)
        right(rig, "2")
        monkeypatch.setattr("tierloom.adapters.proxy.fleet._LOST", 5)
        rig.swap("decode", silent.port)
        answer = rig.ask("x")
        assert (answer.status_code, answer.json()["error"]["type"]) == (502, "server_error")


@pytest.mark.parametrize("rig", [{"prefill_wait": 0.3, "answer_wait": 0.6}], indirect=True)
def test_one_that_is_alive_and_slow_has_its_time(rig: Rig) -> None:
    for engine in rig.prefillers:
        engine.faults = [10.0]
    right(rig)
    assert len(rig.seen("prefill")) == 1
    for engine in rig.decoders:
        engine.faults = [10.0]
    answer = rig.ask("short")
    assert (answer.status_code, "did not answer in 0.6 s" in answer.text) == (504, True)
    assert all(seat.is_up for seat in rig.parts.fleet.seats)


def test_an_engine_is_left_alone_until_it_answers_a_probe(rig: Rig) -> None:
    with RawServer() as bad:
        rig.swap("decode", bad.port, rig.decoders[0].port)
        right(rig)
        right(rig)
        assert bad.taken == 1
        up = f'engine_up{{role="decode",url="http://127.0.0.1:{bad.port}"}}'
        assert rig.metric(up) == 0
        bad.pieces = (b"HTTP/1.1 204 None\r\n\r\n",)
        rig.until(lambda: rig.metric(up))
        rig.ask("x")
        assert bad.taken == 2


def test_no_engine_at_all(rig: Rig) -> None:
    rig.swap("decode")
    answer = rig.ask()
    assert (answer.status_code, "no decoder that takes requests" in answer.text) == (503, True)
    assert rig.client.get("/readyz").status_code == 503
    assert rig.client.get("/livez").status_code == 200


@pytest.mark.parametrize("rig", [{}, {"way": "after"}], indirect=True)
def test_a_client_that_goes_takes_its_requests_along(rig: Rig) -> None:
    rig.ask("warm " + TEXT)  # from here on both are asked at once
    rig.ask("warmer " + TEXT)
    for engine in rig.stubs:
        engine.faults = [10.0]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{rig.url}/v1/completions", json={"model": "stub", "prompt": TEXT}, timeout=0.3,
            headers={"X-Request-Id": "leaves"},
        )  # fmt: skip
    together = rig.parts.way == "auto"
    rig.until(lambda: sum(e.aborted == ["leaves"] for e in rig.stubs) == 1 + together)
    assert rig.metric("gone_total") == 1


def test_a_kept_connection_that_the_engine_closed_is_no_failure(rig: Rig) -> None:
    """Each closes it after its answer without a word."""
    body = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
    with RawServer(body) as closing:
        rig.swap("decode", closing.port)
        for _ in range(5):
            assert rig.ask("x").status_code == 200
        assert rig.metric("retries_total") == 0


def test_drain_and_remove_under_load(rig: Rig) -> None:
    failed, end = [], threading.Event()

    def load(i: int) -> None:
        n = 0
        while not end.is_set():
            n += 1
            if rig.ask(f"{i} {n} {TEXT}").status_code != 200:
                failed.append(n)

    def more(count: int) -> None:
        """Until so many requests more are answered."""
        end = rig.metric("request_seconds_count") + count
        rig.until(lambda: rig.metric("request_seconds_count") >= end)

    threads = [threading.Thread(target=load, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    try:
        for i in range(6):
            engine, role = rig.stubs[i % 4], "prefill" if i % 4 < 2 else "decode"
            order = {"url": f"http://127.0.0.1:{engine.port}", "role": role}
            rig.post("/v1/proxy/engines", {**order, "action": "remove" if i % 3 == 2 else "drain"})
            rig.until(lambda: len(rig.client.get("/v1/proxy/engines").json()["engines"]) == 3)
            more(8)
            taken = len(engine.seen)
            more(8)
            assert len(engine.seen) == taken
            assert rig.post("/v1/proxy/engines", order).status_code == 200
    finally:
        end.set()
        for thread in threads:
            thread.join(20)
    assert not failed
