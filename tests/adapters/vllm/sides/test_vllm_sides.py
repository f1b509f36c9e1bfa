"""The parts of the vLLM connector that need no vLLM: settings, switches, index, worth."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
from hypothesis import given, strategies as st

from tierloom import ConfigError
from tierloom.adapters.vllm.exchange.handoff_params import Told, answer, outside_name, read_params
from tierloom.adapters.vllm.exchange.settings import (
    RequestOptions,
    Settings,
    configured,
    request_options,
)
from tierloom.adapters.vllm.scheduler.load_cost import LoadCost
from tierloom.pipeline.handoff.handoff import ticket_of
from tierloom.stages.directory.chunk_directory import ChunkDirectory, Part

CHUNK, GRAIN = 64, 16


def link(prompt: int, grain: int) -> bytes:
    return bytes([prompt]) * 16 + grain.to_bytes(16, "little")


def chain(prompt: int, grains: int, shared: int = 0) -> list[bytes]:
    """Links of a prompt; the first `shared` grains are those of prompt 0."""
    return [link(0 if i < shared else prompt, i) for i in range(grains)]


def chunks(links: list[bytes]) -> list[bytes]:
    per = CHUNK // GRAIN
    return [b"".join(links[i : i + per]) for i in range(0, len(links), per)]


# -- settings ----------------------------------------------------------------------------------


def test_settings_and_overrides_are_told_apart(monkeypatch) -> None:
    monkeypatch.delenv("TIERLOOM_CONFIG", raising=False)
    plain = configured({})
    assert (plain.settings, plain.source, plain.overrides) == (Settings(), "tiered", {})
    got = configured({"tierloom.config": "minimal", "tierloom.load": "layer",
                      "tierloom.wait": "1 s", "tiers.hot.capacity": "1 GiB"})  # fmt: skip
    assert got.source == "minimal"
    assert (got.settings.load, got.settings.wait) == ("layer", 1.0)
    assert got.overrides == {
        "tiers.hot.capacity": "1 GiB", "graphs.retrieve.pace.by": "layer"
    }  # fmt: skip
    monkeypatch.setenv("TIERLOOM_CONFIG", "/etc/kv.yaml")
    assert configured({}).source == "/etc/kv.yaml"
    assert configured({"tierloom.config": {"version": 1}}).source == {"version": 1}


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"tierloom.laod": "async"}, "unknown key 'laod'.*load"),
        ({"tierloom.load": "sync"}, "one of async, layer"),
        ({"tierloom.save_decode": "yes"}, "true or false"),
        ({"tierloom.wait": "soon"}, "not a time"),
        ({"tierloom.min_tokens": -1}, "must not be negative"),
        ({"tierloom.blend": "on", "tierloom.load": "layer"}, "wants load: async"),
        ({"tierloom.blend": "always"}, "one of off, ask, on"),
        ({"tierloom.blend": True}, "one of off, ask, on"),
        ({"tierloom.wait": "250"}, "'250' has no unit; write '250 ms' or '250 s'"),
        ({"tierloom": {"hold": 0.5}}, "0.5 has no unit; write '0.5 ms' or '0.5 s'"),
        ({"tierloom": {"laod": "async"}}, "unknown key 'laod'.*load"),
        ({"tierloom": "layer"}, "tierloom wants a mapping, got 'layer'"),
        ({"tierloom.load": "layer", "tierloom": {"load": "async"}}, "tierloom.load: is set twice"),
        ({"tiers.hot.capacity": 1, "tiers": {"hot": {"capacity": 2}}}, "hot.capacity: is set twi"),
    ],
)
def test_settings_that_cannot_be_used(extra: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)kv_connector_extra_config.*{says}"):
        configured(extra)


def test_nested_mappings_mean_what_dotted_keys_do(monkeypatch) -> None:
    """vLLM's own dotted flags make them: `...extra_config.tierloom.load layer`."""
    monkeypatch.delenv("TIERLOOM_CONFIG", raising=False)
    got = configured({
        "tierloom": {"save_decode": True, "wait": "1 s"}, "tierloom.load": "layer",
        "tiers": {"hot": {"capacity": "1 GiB"}}, "tiers.warm.capacity": "2 GiB",
    })  # fmt: skip
    assert got.settings == Settings(save_decode=True, wait=1.0, load="layer")
    spec = got.pipeline()
    assert [t.options.capacity for t in spec.tiers.values()] == [1 << 30, 2 << 30]
    assert spec.graphs["retrieve"].options.pace.by == "layer"


@pytest.mark.parametrize(
    "said",
    [{"graphs.retrieve.pace.by": "request"}, {"graphs": {"retrieve": {"pace": {"by": "request"}}}}],
)
def test_what_the_user_says_of_the_pipeline_wins(said) -> None:
    spec = configured({"tierloom.load": "layer", **said}).pipeline()
    assert spec.graphs["retrieve"].options.pace.by == "request"


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"tierloom.blend": "on"}, "tierloom.blend: on, but .*finds no text anywhere"),
        ({"tiers.hto.capacity": "1 GiB"}, "tiers.hto.capacity: no 'hto' in tiers"),
        ({"tierloom.config": "teired"}, "no preset is called 'teired'"),
        ({"tierloom.config": {"version": 1, "graphs": {"stroe": {}}}}, "graphs.stroe: there is no"),
        ({"graphs": {"store": {"deadline": 5}}}, "graphs.store.deadline: 5 has no unit"),
    ],
)
def test_mistakes_of_the_pipeline_stand_where_they_were_written(extra, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^kv_connector_extra_config: {says}"):
        configured(extra).pipeline()


@pytest.mark.parametrize(
    "said",
    [{"tierloom.keys": "sglang"}, {"chunk.keys": "sglang"}, {"chunk": {"keys": "sglang"}},
     {"tierloom.keys": "sglang", "chunk.keys": "sglang"}],
)  # fmt: skip
def test_sglangs_keys_may_be_asked_for_in_two_ways(said) -> None:
    assert configured(said).pipeline().chunk.keys == "sglang"


@pytest.mark.parametrize(("keys", "other"), [("engine", "sglang"), ("sglang", "own")])
def test_keys_of_two_kinds_are_refused(keys: str, other: str) -> None:
    says = f"tierloom.keys: {keys} and chunk.keys: {other} contradict"
    with pytest.raises(ConfigError, match=f"^kv_connector_extra_config: {says}"):
        configured({"tierloom.keys": keys, "chunk.keys": other}).pipeline()


def test_wishes_of_a_request() -> None:
    assert request_options(None) == request_options({"do_remote_decode": True}) == RequestOptions()
    got = request_options({"tierloom.skip_save": True, "tierloom.tags": {"b": 1, "a": "x"},
                  "tierloom.max_tokens": 64})  # fmt: skip
    assert got == RequestOptions(skip_save=True, tags=(("a", "x"), ("b", "1")), max_tokens=64)
    nested = {
        "tierloom": {"skip_save": True, "max_tokens": 64},
        "tierloom.tags": {"b": 1, "a": "x"},
    }
    assert request_options(nested) == got


@pytest.mark.parametrize(
    "params",
    [
        {"tierloom.skip": True}, {"tierloom.skip_load": 1}, {"tierloom.tags": ["a"]},
        {"tierloom.blend": "yes"}, {"tierloom.blend": 1},
        {"tierloom.max_tokens": -1}, {"tierloom.max_tokens": True}, {"tierloom": True},
        {"tierloom": {"skip": 1}}, {"tierloom.skip_save": False, "tierloom": {"skip_save": True}},
    ],
)  # fmt: skip
def test_wishes_that_cannot_be_read(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(params)).replace(".", r"\.")):
        request_options(params)


# -- index -------------------------------------------------------------------------------------


def directory(shares: int = 1) -> ChunkDirectory:
    return ChunkDirectory(("hot", "warm"), holders=shares, chunk=CHUNK, grain=GRAIN)


def test_a_prompt_is_found_up_to_where_it_leaves_what_is_kept() -> None:
    index = directory()
    for part in chunks(chain(0, 12)):
        assert index.note(0, "hot", True, part) == (part[-32:], True)
    assert index.find(chain(0, 12), 192) == [Part(64, "hot")] * 3
    assert index.find(chain(0, 12), 160) == [Part(64, "hot"), Part(64, "hot"), Part(32, "hot")]
    assert index.find(chain(7, 12, shared=6), 192) == [Part(64, "hot"), Part(32, "hot")]
    assert index.find(chain(7, 12), 192) == []
    assert index.find(chain(0, 6), 96) == [Part(64, "hot"), Part(32, "hot")]


def test_a_chunk_counts_only_where_every_share_of_it_is() -> None:
    index, part = directory(shares=3), chunks(chain(0, 4))[0]
    assert index.note(0, "hot", True, part) is None
    assert index.note(1, "hot", True, part) is None
    assert not index.find(chain(0, 4), 64)
    assert index.note(2, "warm", True, part) == (part[-32:], True)
    assert index.find(chain(0, 4), 64) == [Part(64, "warm")], "the slowest share decides"
    assert index.note(2, "hot", True, part) is None
    assert index.find(chain(0, 4), 64) == [Part(64, "hot")]
    assert index.note(1, "hot", False, part) == (part[-32:], False)
    assert not index.find(chain(0, 4), 64)
    for share in (0, 2):
        index.note(share, "hot", False, part)
    index.note(2, "warm", False, part)
    assert len(index) == 0
    assert not index._inner


class Event(NamedTuple):
    share: int
    tier: str
    kept: bool
    prompt: int
    at: int


events = st.lists(
    st.builds(
        Event, st.integers(0, 1), st.sampled_from(["hot", "warm"]), st.booleans(),
        st.integers(0, 2), st.integers(0, 2),
    ),
    max_size=60,
)  # fmt: skip


@given(events)
def test_the_index_says_what_a_plain_list_would(history: list[Event]) -> None:
    """Whole chunks, against a set of (share, tier, chunk)."""
    index, kept = directory(shares=2), set()
    parts = {p: chunks(chain(p, 12, shared=4)) for p in range(3)}  # the first chunk is all's
    for e in history:
        part = parts[e.prompt][e.at]
        index.note(e.share, e.tier, e.kept, part)
        (kept.add if e.kept else kept.discard)((e.share, e.tier, part))
    for p in range(3):
        whole = 0
        for part in parts[p]:
            if not all(any((s, t, part) in kept for t in ("hot", "warm")) for s in (0, 1)):
                break
            whole += 1
        found = index.find(chain(p, 12, shared=4), 192)
        assert sum(x.tokens for x in found) == whole * CHUNK
        assert all(index.has(part[-32:]) for part in parts[p][:whole])
    assert len(index) == len({part for _, _, part in kept})


# -- worth -------------------------------------------------------------------------------------


class Says(NamedTuple):
    worth: str = "auto"
    token_bytes: int = 1000
    deadline: float = 0.8


def test_a_load_that_is_slower_than_computing_is_cut() -> None:
    w = LoadCost(1)
    plan = [Part(64, "hot"), Part(64, "warm"), Part(64, "warm")]
    assert w.cut(Says(), plan, 0, 256) == plan, "nothing is known yet"
    w.rate, w.costs = 1000.0, {"hot": (0.001, 1e-9), "warm": (1.0, 1e-6)}
    assert w.cut(Says(), plan, 0, 256) == plan[:1]
    assert w.cut(Says("always"), plan, 0, 256) == plan
    assert w.cut(Says("never"), plan, 0, 256) == []
    w.costs["warm"] = (0.01, 1e-9)
    assert w.cut(Says(), plan, 0, 256) == plan
    w.rate = 1e9
    assert w.cut(Says(), plan, 0, 256) == []


def test_patience_grows_with_size_but_not_beyond_computing() -> None:
    w = LoadCost(1)
    assert w.seconds(Says(), 1) == 0.8
    assert w.seconds(Says(), 1_024_000) == pytest.approx(4.0)
    w.rate = 1_024_000.0
    assert w.seconds(Says(), 1_024_000) == pytest.approx(2.0)


def test_prefill_speed_is_measured_between_steps(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("tierloom.adapters.vllm.scheduler.load_cost.time.monotonic", lambda: now[0])
    w = LoadCost(1)
    for at, computed in ((0.0, 1000), (2.0, 1), (2.1, 1), (60.0, 500), (61.0, 0)):
        now[0] = at
        w.step(computed)
    assert w.rate == pytest.approx(500.0)


# -- hand-off ---------------------------------------------------------------------------------

X = "7f1c0a52-94d6-4ab1-8d2e-3f00a1b2c3d4"
PUSHED = {"do_remote_decode": False, "do_remote_prefill": True, "remote_engine_id": "e",
          "remote_host": "10.0.0.2", "remote_port": 7655, "tp_size": 1, "pp_size": 1,
          "remote_request_id": X}  # fmt: skip
"""As vLLM's toy push proxy tells a decoder."""


@pytest.mark.parametrize("x", [X, "a", "a-1", "x-00000000-1", "12345678", "ab\ncd", "cmpl-b-0"])
@pytest.mark.parametrize("made", ["cmpl-{}-0-0123abcd", "cmpl-{}-17-12345678", "cmpl-{}-0",
                                  "1_cmpl-{}-3-0123abcd", "chatcmpl-{}-0123abcd",
                                  "2_chatcmpl-{}-0123abcd"])  # fmt: skip
def test_a_name_is_what_the_client_said(made: str, x: str) -> None:
    assert outside_name(made.format(x)) == x


@pytest.mark.parametrize("name", ["", "7", "p-0123abcd", "cmpl-", "cmpl-a", "chatcmpl-", "resp_1"])
def test_other_names_are_as_they_are(name: str) -> None:
    assert outside_name(name) == name


def test_who_names_only_the_request_may_ask_before_the_prefiller_has_it() -> None:
    _, landed = read_params(PUSHED)
    assert landed is not None
    assert (landed.host, landed.port, landed.later) == ("10.0.0.2", 7655, True)
    assert landed.ticket == ticket_of(outside_name(f"cmpl-{X}-0-0123abcd"))


def test_who_has_an_answer_asks_for_what_there_is() -> None:
    told = answer("e", X, "tierloom://10.0.0.2:7655", 700, 1)
    assert told is not None
    _, landed = read_params(json.loads(json.dumps(told)))
    assert landed is not None
    assert (landed.ticket, landed.later) == (ticket_of(X), False)
    _, landed = read_params({**told, "transfer_id": "t"})
    assert landed is not None
    assert (landed.ticket, landed.later) == (ticket_of("t"), True)


def test_a_decoders_usage_is_its_own() -> None:
    """vLLM adds what the prefiller had cached, and a decoder's vLLM would report that."""
    told: Any = answer("e", X, "tierloom://10.0.0.2:7655", 700, 1)
    assert isinstance(told, Told)
    assert told.get("do_remote_prefill")  # then vLLM does this:
    told["remote_prefill_cached_tokens"] = 0
    told["anything_else"] = 1
    assert "remote_prefill_cached_tokens" not in told
    assert told["anything_else"] == 1
