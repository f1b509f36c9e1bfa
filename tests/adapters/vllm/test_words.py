"""What the connector says: to operators in the log, to routers in events."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from harness import Engine, prompt, transfer
from serving import free_port

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Expect


def said(engine: Engine, what: str, since: int = 0) -> list[str]:
    return [line for line in engine.log_text()[since:].splitlines() if re.search(what, line)]


def test_a_line_for_each_load_and_store(engine: Engine, llama: Path, expect: Expect) -> None:
    engine.use(llama, transfer())
    engine.forget(connector=True)
    tokens = prompt(1000, seed=600)
    begun = len(engine.log_text())
    expect(engine, tokens, cached=0, name="first")
    engine.settle()
    assert len(said(engine, r"request first-\w+: .*\b992 stored", begun)) == 1
    assert not said(engine, r"request first-\w+: .*loaded", begun)
    expect(engine, tokens, cached=992, name="second")
    engine.settle()
    (line,) = said(engine, r"request second-\w+: 1000 tokens, .*\b992 to load, 992 loaded", begun)
    assert re.search(r"hot.*\b992\b|\b992\b.*hot", line)
    assert re.search(r"GB/s|MB/s", line)


def test_policy_that_fails_requests_is_mended_and_said(
    engine: Engine, llama: Path, expect: Expect
) -> None:
    """vLLM's default fails a request whose load fails."""
    begun = len(engine.log_text()) if engine.log.exists() else 0
    liar = {"use": "flaky", "capacity": "64 MiB", "rate": 1.0, "corrupt": True}
    kv = transfer(**{"tiers.hot": liar})
    del kv["kv_connector_extra_config"]["tiers.hot.capacity"]
    del kv["kv_load_failure_policy"]
    log = engine.log
    engine.use(llama, kv)
    assert len(said(engine, "kv_load_failure_policy", begun if engine.log == log else 0)) >= 1
    tokens = prompt(800, seed=601)
    for _ in range(3):
        assert expect(engine, tokens).reason == "length"
        engine.settle()


def test_bad_options_are_named(engine: Engine, llama: Path) -> None:
    """The engine does not start with an option that means nothing; the error says which."""
    for kv, word in (
        (transfer(**{"tierloom.lood": "layer"}), "lood"),
        (transfer(**{"tiers.hot.kapacity": "1 GiB"}), "kapacity"),
    ):
        error = ""
        try:
            engine.use(llama, kv)
        except AssertionError as refused:
            error = str(refused) + engine.log_text()[-6000:]
        assert word in error, f"{word} was accepted"


def test_events(engine: Engine, llama: Path, expect: Expect) -> None:
    """Stored, with its medium; and removed, when it is pushed out."""
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://127.0.0.1:{free_port()}",
    }
    kv = transfer(**{"tiers.hot.capacity": "4 MiB"})  # 2,048 tokens
    engine.use(llama, kv, enable_prefix_caching=True, kv_events_config=events)
    engine.ask("events")
    expect(engine, prompt(1024, seed=610), cached=0)
    engine.settle()
    stored = [e for e in engine.ask("events") if e["kind"] == "BlockStored"]
    kept = {h for e in stored if e["medium"] == "CPU" for h in e["hashes"]}
    own = {h for e in stored if e["medium"] != "CPU" for h in e["hashes"]}
    assert len(kept) == 32
    assert kept <= own, "they are named as vLLM names its own blocks"
    for i in range(4):
        expect(engine, prompt(1024, seed=612 + i))
        engine.settle()
    gone = [e for e in engine.ask("events") if (e["kind"], e["medium"]) == ("BlockRemoved", "CPU")]
    assert {h for e in gone for h in e["hashes"]} & kept
