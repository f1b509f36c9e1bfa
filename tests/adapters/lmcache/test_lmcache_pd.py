"""LMCache's prefiller and decoder, as its guide configures them: converted, and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tierloom.adapters.lmcache.convert import convert, yaml_text
from tierloom.adapters.lmcache.options import Given, from_file
from tierloom.pipeline.config import load as check
from tierloom.stages.tiers.net.address import Address

HERE = Path(__file__).parent


def made(given: Given) -> tuple[str, dict[str, Any], list[str]]:
    """The text, the YAML of it, and what is said to be missing."""
    draft = convert(given)
    text = yaml_text(draft, given, "lmcache.yaml")
    return text, yaml.safe_load(text), draft.missing


def of(role: str, **options: Any) -> Given:
    return Given({"enable_pd": True, "pd_role": role, **options}, "lmcache.yaml")


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "memory_here", lambda: 1 << 40)
    for name in ("TIERLOOM_LISTEN", "TIERLOOM_PREFILLERS", "TIERLOOM_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_a_sender_is_a_prefiller() -> None:
    text, tree, missing = made(from_file(HERE / "pd_prefill.yaml"))
    assert missing == []
    assert '"kv_role": "kv_producer"' in text
    assert tree["order"] == "canonical"
    assert tree["serve"] == {"listen": "${TIERLOOM_LISTEN:-0.0.0.0:0}", "tiers": ["hot"]}
    assert tree["handoff"] == {"peers": ["${TIERLOOM_DECODERS:-}"], "proxy": "proxy.example:7500"}
    assert tree["tiers"] == {"hot": {"use": "memory", "capacity": "2 GiB"}}
    for said in ("set TIERLOOM_DECODERS", "set TIERLOOM_TOKEN", "transfer_channel nixl"):
        assert said in text
    spec = check.load_config(tree)
    assert spec.serve is not None
    assert spec.serve.tiers == ["hot"]


def test_a_receiver_is_a_decoder() -> None:
    text, tree, missing = made(from_file(HERE / "pd_decode.yaml"))
    assert missing == []
    assert '"kv_role": "kv_both"' in text, "it saves what it generates"
    assert tree["serve"] == {"listen": "decode.example:7300", "tiers": ["hot"]}
    assert "pd_peer_alloc_port is not used" in text
    assert "set TIERLOOM_PREFILLERS" in text
    assert list(tree["tiers"]) == ["hot", "cold"]
    assert tree["tiers"]["hot"]["capacity"] == "5 GiB"
    assert "pd_retrieve_locations: [PDBackend] (a decoder asks" in text
    handoff = check.load_config(tree).handoff
    assert handoff is not None
    assert handoff.named == set(), "on another host: those with the token"
    assert handoff.offers


def test_on_one_host_they_find_each_other_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    _, p, _ = made(of("sender", pd_proxy_host="localhost", pd_proxy_port=7500))
    here = {"pd_peer_host": "localhost", "pd_peer_init_port": [7300]}
    text, d, _ = made(of("receiver", save_decode_cache=False, **here))
    serve, handoff = check.load_config(p).serve, check.load_config(d).handoff
    told = check.load_config(p).handoff
    assert serve is not None
    assert told is not None
    assert {("localhost", 0), ("127.0.0.1", 0)} <= told.named, "as its proxy calls the decoder"
    assert (told.proxy, d["serve"]["listen"]) == ("localhost:7500", "127.0.0.1:7300")
    assert handoff is not None
    host = Address.parse(f"tcp://{serve.listen}", "tcp").host
    assert (host, 0) in handoff.named
    assert "TIERLOOM_TOKEN" not in text
    assert '"kv_role": "kv_consumer"' in text
    monkeypatch.setenv("TIERLOOM_PREFILLERS", "10.0.0.2, 10.0.0.3:7655")
    handoff = check.load_config(d).handoff
    assert handoff is not None
    assert handoff.named == {("10.0.0.2", 0), ("10.0.0.3", 7655)}


@pytest.mark.parametrize(
    ("options", "capacity"),
    [
        ({}, "5 GiB"),
        ({"pd_buffer_size": 8 << 30}, "16 GiB"),
        ({"pd_buffer_size": 8 << 30, "max_local_cpu_size": 20}, "20 GiB"),
        ({"local_cpu": False, "max_local_cpu_size": 3}, "2 GiB"),
        ({"local_cpu": False, "max_local_cpu_size": 3, "pd_buffer_size": 4 << 30}, "8 GiB"),
    ],
)
@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_half_of_memory_is_what_the_buffer_was(
    role: str, options: dict[str, Any], capacity: str
) -> None:
    _, tree, _ = made(of(role, local_disk="/x", max_local_disk_size=9, **options))
    assert list(tree["tiers"]) == ["hot", "warm"]
    assert tree["tiers"]["hot"]["capacity"] == capacity
    assert check.load_config(tree).tiers.keys() == {"hot", "warm"}


def test_both_directions_and_whole_prompts() -> None:
    for role in ("sender", "receiver"):
        given = of(role, pd_bidirectional=True, save_unfull_chunk=False)
        text, tree, _ = made(given)
        assert '"kv_role": "kv_both"' in text
        assert tree["chunk"]["partial"] is True


def test_a_role_that_is_none_is_told() -> None:
    for given in (of("both"), Given({"enable_pd": True}, "l.yaml")):
        text, tree, (said,) = made(given)
        assert "it is sender or receiver" in said
        assert said in text
        assert not {"serve", "handoff", "order"} & tree.keys()
        check.load_config(tree)


def test_without_enable_pd_they_say_nothing() -> None:
    text, tree, missing = made(of("sender", enable_pd="no", pd_proxy_host="h", pd_proxy_port=1))
    assert not {"serve", "handoff"} & tree.keys()
    assert (missing, '"kv_role": "kv_both"' in text) == ([], True)
    assert text.count("(without enable_pd nothing is handed over)") == 3


def test_one_that_shares_by_p2p_serves_once() -> None:
    given = of("sender", enable_p2p=True, p2p_host="10.0.0.2", p2p_init_ports=8200)
    _, tree, _ = made(given)
    assert tree["serve"]["listen"] == "10.0.0.2:8200"
    assert check.load_config(tree).serve is not None
