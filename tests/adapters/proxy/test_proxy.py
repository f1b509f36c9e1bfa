"""What engines are asked and clients answered, with everybody well."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from proxy_rig import TEXT, Rig
from stub_engine import completion, event

ASKED = {
    "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None,
    "remote_block_ids": None, "remote_host": None, "remote_port": None,
}  # fmt: skip


def test_after_the_decoder_gets_what_the_prefiller_answered(rig: Rig, caplog) -> None:
    answer = rig.ask(
        max_tokens=5, temperature=0.25, headers={"X-Request-Id": "me", "traceparent": "t"}
    )
    assert answer.status_code == 200
    assert answer.json() == completion({"prompt": TEXT, "max_tokens": 5})
    (asked,), (told,) = rig.seen("prefill"), rig.seen("decode")
    for body in (asked, told):
        headers = body.pop("headers")
        assert (headers["x-request-id"], headers["traceparent"]) == ("me", "t")
        assert body.pop("prompt") == TEXT
    prefiller = next(e for e in rig.prefillers if e.seen)
    assert asked == {
        "model": "stub", "max_tokens": 1, "stream": False, "temperature": 0.25,
        "kv_transfer_params": ASKED,
    }  # fmt: skip
    assert told == {
        "model": "stub", "max_tokens": 5, "temperature": 0.25,
        "kv_transfer_params": prefiller.params("me"),
    }  # fmt: skip
    assert answer.headers["x-request-id"] == "me"
    (line,) = [r.getMessage() for r in caplog.records if "request me" in r.getMessage()]
    assert re.search(
        r"way=after status=200 tokens=1\d\d\d .*prefill=0\.\d+ first=0\.\d+ total", line
    )


def test_together_both_are_asked_under_one_name_of_its_own(rig: Rig) -> None:
    for path in ("a", "b", "c"):
        assert rig.ask(path + TEXT, headers={"X-Request-Id": "same"}).status_code == 200
    ways = [
        b["kv_transfer_params"]
        for b in rig.seen("prefill")
        if "transfer_id" in b["kv_transfer_params"]
    ]
    told = [
        b["kv_transfer_params"]
        for b in rig.seen("decode")
        if "transfer_id" in b["kv_transfer_params"]
    ]
    assert len(ways) == len(told) >= 1
    names = {way.pop("transfer_id") for way in ways}
    assert all(way == ASKED for way in ways)
    ports = {f"engine-{e.port}": e.port + 1 for e in rig.prefillers}
    for params in told:
        assert params.pop("transfer_id") == params.pop("remote_request_id") in names
        assert params.pop("remote_port") == ports[params.pop("remote_engine_id")]
        assert params == {
            "do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [],
            "remote_host": "127.0.0.1",
        }  # fmt: skip
    assert len(names) == len(told)


@pytest.mark.parametrize(("takes", "ended"), [(0.2, []), (10.0, ["late"])])
def test_together_a_prefill_that_nobody_waits_for_ends_soon(
    rig: Rig, takes, ended, monkeypatch
) -> None:
    monkeypatch.setattr("tierloom.adapters.proxy.exchange._GRACE", 0.6)
    for i in range(2):
        rig.ask(f"{i}{TEXT}")
    rig.until(rig.at_rest)
    for engine in rig.prefillers:
        engine.faults = [takes]
    for engine in rig.decoders:
        engine.faults = ["at once"]
    assert rig.ask("3" + TEXT, headers={"X-Request-Id": "late"}).status_code == 200
    assert not rig.at_rest()
    rig.until(rig.at_rest)
    rig.until(lambda: [each for e in rig.prefillers for each in e.aborted] == ended)


@pytest.mark.parametrize("rig", [{"way": "after"}], indirect=True)
def test_the_way_can_be_said(rig: Rig) -> None:
    for i in range(4):
        rig.ask(f"{i}{TEXT}")
    assert not any("transfer_id" in b["kv_transfer_params"] for b in rig.seen("decode"))


def test_a_stream_comes_byte_by_byte_as_it_is(rig: Rig) -> None:
    body = {"prompt": TEXT, "model": "stub", "max_tokens": 9, "stream": True}
    body["stream_options"] = {"include_usage": True}
    with rig.client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        got = b"".join(answer.iter_raw())
    engine = next(e for e in rig.decoders if e.seen)
    with httpx.stream("POST", f"http://127.0.0.1:{engine.port}/v1/completions", json=body) as alone:
        assert got == b"".join(alone.iter_raw())
    assert got.endswith(event({**completion(body), "choices": []}) + b"data: [DONE]\n\n")
    (asked,) = rig.seen("prefill")
    assert asked["stream"] is False
    assert "stream_options" not in asked


def test_a_stream_is_not_held_back(rig: Rig) -> None:
    for engine in rig.decoders:
        engine.pace = 0.15
    body = {"prompt": "x", "model": "stub", "max_tokens": 8, "stream": True}
    with rig.client.stream("POST", "/v1/completions", json=body) as answer:
        pieces = answer.iter_raw()
        assert next(pieces).count(b"data:") == 1
        assert not rig.at_rest()
    rig.until(lambda: any(e.aborted for e in rig.decoders))


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 4000}}


@pytest.mark.parametrize(
    "extra",
    [
        {"n": 3, "logprobs": True, "top_logprobs": 2, "seed": 2**70, "temperature": 1e-7},
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "stop": ["\ud800é"],
        },
        {
            "max_completion_tokens": 4,
            "max_tokens": None,
            "min_tokens": 3,
            "response_format": {"type": "text"},
        },
        {"kv_transfer_params": {"tierloom.tags": {"project": "x"}}},
    ],
)
def test_what_a_decoder_reads_is_what_the_client_wrote(rig: Rig, extra) -> None:
    content = [{"type": "text", "text": TEXT}, IMAGE]
    said = {"model": "stub", "messages": [{"role": "user", "content": content}], **extra}
    answer = rig.post("/v1/chat/completions", said)
    assert answer.json() == completion(said)
    (told,), (asked,) = rig.seen("decode"), rig.seen("prefill")
    told.pop("headers")
    params = told.pop("kv_transfer_params")
    assert params["remote_request_id"]
    for body in (params, asked["kv_transfer_params"]):
        assert body.get("tierloom.tags") == extra.get("kv_transfer_params", {}).get("tierloom.tags")
    assert told == {k: v for k, v in said.items() if k != "kv_transfer_params"}
    limit = "max_completion_tokens" if "max_completion_tokens" in extra else "max_tokens"
    assert asked[limit] == 1
    assert asked.get("n", 1) == 1
    assert "min_tokens" not in asked


def test_bytes_of_a_body_stay(rig: Rig) -> None:
    raw = (
        b'  {"model":"stub" ,"x":1.10,"max_tokens":2, "prompt":'
        + json.dumps(TEXT).encode()
        + b"}\n"
    )
    assert rig.client.post("/v1/completions", content=raw).status_code == 200
    (told,) = rig.seen("decode")
    headers = told.pop("headers")
    added = b',"kv_transfer_params": ' + json.dumps(told["kv_transfer_params"]).encode()
    assert int(headers["content-length"]) == len(raw.strip()) + len(added) + (
        2 if raw[:1] == b" " else 0
    )


def test_a_client_names_no_engines_to_one_another(rig: Rig) -> None:
    evil = {
        "do_remote_prefill": True,
        "remote_host": "10.0.0.1",
        "remote_port": 1,
        "transfer_id": "t",
    }
    rig.ask("short", kv_transfer_params={**evil, "tierloom.tags": {"a": "b"}})
    (told,) = rig.seen("decode")
    assert told["kv_transfer_params"] == {"tierloom.tags": {"a": "b"}}


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "short"},
        {"prompt": [TEXT, TEXT]},
        {"prompt": [[1] * 900, [2] * 900]},
        {"prompt": list(range(500))},
        {"prompt": TEXT, "use_beam_search": True},
        {"prompt": TEXT, "prompt_logprobs": 0},
        {"prompt": TEXT, "echo": True, "logprobs": 1},
        {"prompt": None, "prompt_embeds": "x" * 5000},
    ],
)
def test_what_a_decoder_computes_alone(rig: Rig, body) -> None:
    assert rig.ask(**body).status_code == 200
    assert not rig.seen("prefill")
    (told,) = rig.seen("decode")
    assert "kv_transfer_params" not in told


def test_token_ids_are_counted(rig: Rig) -> None:
    rig.ask(list(range(513)))
    assert len(rig.seen("prefill")) == 1


def test_a_prompt_goes_where_its_beginning_went(rig: Rig) -> None:
    rig.prefillers[0].faults = [500]
    rig.ask(TEXT)  # the second prefiller has computed it, the first decoder has answered
    for _ in range(3):  # what the decoder has had it computes by itself
        rig.ask(TEXT + "and more " * 20)
    assert [len(e.seen) for e in rig.stubs] == [1, 1, 4, 0]
    rig.ask(TEXT + "and very much more " * 300)
    rig.ask("other " + TEXT + "and very much more " * 300)
    assert [len(e.seen) for e in rig.prefillers] == [2, 2]


def test_work_is_spread(rig: Rig) -> None:
    for engine in rig.stubs:
        engine.faults = [0.3] * 4
    with ThreadPoolExecutor(4) as threads:
        assert all(
            a.status_code == 200 for a in threads.map(lambda i: rig.ask(f"{i}{TEXT}"), range(4))
        )
    assert [len(e.seen) for e in rig.stubs] == [2, 2, 2, 2]


def test_lengths_are_learned(rig: Rig) -> None:
    before = rig.parts.fleet.bytes_per_token
    japanese = (
        "静かな調査は千九百三十六年に始まった。" * 60
    )  # 3 bytes a letter, 4 letters a token here
    rig.ask(japanese)
    rig.ask("a" + japanese, stream=True, stream_options={"include_usage": True})
    assert rig.parts.fleet.bytes_per_token > before + 1


def test_other_paths_are_passed(rig: Rig) -> None:
    assert rig.client.get("/v1/models").json()["data"][0]["id"] == "stub"
    assert rig.client.head("/v1/models").status_code == 200
    assert rig.client.post("/v1/embeddings", json={"input": "abc"}).json()["data"] == [
        {"embedding": [3]}
    ]
    made = [
        rig.client.post("/v1/responses", json={"model": "stub", "input": f"{i}"}).json()
        for i in range(4)
    ]
    for said in made:
        assert rig.client.get(f"/v1/responses/{said['id']}?x=1").json()["at"] == said["at"]
        again = {"model": "stub", "input": "on", "previous_response_id": said["id"]}
        assert rig.post("/v1/responses", again).json()["at"] == said["at"]
    assert not rig.seen("prefill")


def test_health_and_metrics(rig: Rig) -> None:
    rig.ask(TEXT)
    assert [rig.client.get(p).status_code for p in ("/livez", "/readyz", "/health")] == [200] * 3
    assert rig.metric('requests_total{path="/v1/completions",way="after",status="200"}') == 1
    assert rig.metric('handoffs_total{outcome="params"}') == 1
    assert rig.metric("engine_up") == 4
    text = rig.client.get("/metrics").text
    line = re.compile(r"(# (HELP|TYPE) tierloom_proxy_\w+ .+|tierloom_proxy_\w+(\{.+\})? [\d.]+)")
    assert all(line.fullmatch(each) for each in text.splitlines())
