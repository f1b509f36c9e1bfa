"""`tierloom proxy --lmcache`, over engines that speak as LMCache's do."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import zmq
from proxy_rig import TEXT, Rig, renew
from stub_engine import words

from tierloom.adapters.proxy.lmcache_side import LmcacheSide, ReceiverPorts
from tierloom.stages.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

PORTS = ReceiverPorts.parsed("7300,7301/7400,7401")
TOLD = 'requests_total{path="/v1/completions",way="told"'
LATE = 'handoffs_total{outcome="late"'


@pytest.fixture
def told(rig: Rig) -> Iterator[Rig]:
    """Notes come 0.1 s after a prefiller's answer, one for each of two ranks."""
    side, listening = LmcacheSide("127.0.0.1:0", 0.6), list[Any]()
    ports = [stub.port for stub in rig.stubs]

    def begin() -> None:
        renew(rig.parts, ports, lmcache=side, receiver=PORTS)
        listening.append(asyncio.ensure_future(side.listen()))

    def end() -> None:
        listening[0].cancel()
        side.close()

    rig.threads.do(begin)
    for stub in rig.stubs:
        stub.notes, stub.noted = (f"127.0.0.1:{side.port}", 0.1), {}
    yield rig
    rig.until(rig.at_rest)
    assert not side._awaited
    rig.threads.do(end)
    for stub in rig.stubs:
        stub.notes = ("", None)


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": TEXT}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": TEXT}]}),
    ],
)
def test_the_decoder_is_asked_when_all_is_there(told: Rig, path: str, asked: Any) -> None:
    """With the client's own bytes."""
    client = {"model": "stub", "max_tokens": 5, "logprobs": 2, **asked}
    assert told.post(path, client).status_code == 200
    (p,), (d,) = told.seen("prefill"), told.seen("decode")
    spec = p["kv_transfer_params"]["disagg_spec"]
    assert p["kv_transfer_params"]["ret_first_tok"] is True
    assert spec["receiver_host"] == "127.0.0.1"
    assert (spec["receiver_init_port"], spec["receiver_alloc_port"]) == PORTS
    assert (p["max_tokens"], p["stream"]) == (1, False)
    d.pop("headers")
    assert d == client
    noted = {name: at for stub in told.prefillers for name, at in stub.noted.items()}
    (asked_at,) = [seen["at"] for stub in told.decoders for seen in stub.seen]
    assert asked_at >= noted[spec["req_id"]]
    assert told.metric(TOLD) == (path == "/v1/completions")
    assert not told.metric(LATE)


def test_it_streams(told: Rig) -> None:
    asked = {"model": "stub", "prompt": TEXT, "stream": True}
    with told.client.stream("POST", "/v1/completions", json=asked) as answer:
        text = b"".join(answer.iter_raw()).decode()
    assert all(word in text for word in words(TEXT, 16))


@pytest.mark.parametrize("seconds", [None, 30.0])
def test_without_a_note_the_decoder_computes(told: Rig, seconds: float | None) -> None:
    for stub in told.stubs:
        stub.notes = (stub.notes[0], seconds)
    assert told.ask().status_code == 200
    assert len(told.seen("decode")) == 1
    assert told.metric(LATE) == 1


@pytest.mark.parametrize(
    ("faults", "prefills"),
    [([500, 0.0], 2), ([500, 503], 2), ([400], 1), (["garbage", 0.0], 2), (["no params"], 1)],
)
def test_a_prefiller_that_fails(told: Rig, faults: list[Any], prefills: int) -> None:
    """Another is told of the same decoder; if none is left that decoder computes, at once."""
    for stub, fault in zip(told.prefillers, faults, strict=False):
        stub.faults = [fault]
    assert told.ask().status_code == 200
    asked = told.seen("prefill")
    assert len(asked) == prefills
    assert len({p["kv_transfer_params"]["disagg_spec"]["req_id"] for p in asked}) == 1
    assert len(told.seen("decode")) == 1
    assert not told.metric(LATE)


def test_a_decoder_that_fails(told: Rig) -> None:
    told.decoders[0].faults = [500]
    assert told.ask().status_code == 200
    assert len(told.seen("decode")) == 2


def test_who_is_asked_alone(told: Rig) -> None:
    """Short prompts, and decoders of which no ports are known."""
    assert told.ask("short").status_code == 200
    for seat in told.parts.fleet.seats:
        seat.ports = None
    assert told.ask().status_code == 200
    assert not told.seen("prefill")
    assert not told.metric(TOLD)


def test_a_client_names_no_engine_to_another(told: Rig) -> None:
    forged = {"disagg_spec": {"req_id": "x", "receiver_host": "evil"}, "ret_first_tok": True}
    for prompt in (TEXT, "short"):
        assert told.ask(prompt, kv_transfer_params=forged | {"mine": 1}).status_code == 200
    assert [p["kv_transfer_params"]["mine"] for p in told.seen("prefill")] == [1]
    assert "evil" not in str(told.seen("prefill") + told.seen("decode"))
    assert all(d["kv_transfer_params"] == {"mine": 1} for d in told.seen("decode"))


def test_notes_that_nobody_waits_for(told: Rig) -> None:
    """Of a request that is over, and bytes that are none."""
    side = told.parts.lmcache
    assert side is not None
    with zmq.Context.instance().socket(zmq.PUSH) as sock:
        sock.connect(f"tcp://127.0.0.1:{side.port}")
        for raw in (b"", b"\x82\xa4type\xaaProxyNotif\xa6req_id\xa217", b"\xff" * 100):
            sock.send(raw)
        assert told.ask().status_code == 200
        sock.close(1000)
    assert not told.metric(LATE)


def test_a_decoder_is_added_with_its_ports(told: Rig) -> None:
    order = {"action": "add", "role": "decode", "url": "http://127.0.0.1:1"}
    assert told.post("/v1/proxy/engines", order | {"receiver": "7300"}).status_code == 400
    assert told.post("/v1/proxy/engines", order | {"receiver": "7300/7400"}).status_code == 200
    assert told.parts.fleet.seats[-1].ports == ([7300], [7400])


def test_mistakes() -> None:
    for text in ("", "1", "1/", "1/2,3", "x/y", "0/1", "1/70000", "1/2/3"):
        with pytest.raises(ConfigError, match="write INIT/ALLOC"):
            ReceiverPorts.parsed(text)
    for at in ("", "here", "a:b:c"):
        with pytest.raises(ConfigError, match="write HOST:PORT"):
            LmcacheSide(at, 1.0)
    with contextlib.closing(LmcacheSide("127.0.0.1:0", 1.0)) as side:
        taken = f"127.0.0.1:{side.port}"
        with pytest.raises(ConfigError, match=f"--lmcache {taken}"):
            LmcacheSide(taken, 1.0)
