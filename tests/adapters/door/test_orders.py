"""Orders by HTTP, by the command line and by call: the same, counted by hand."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from door_rig import HOT, asked, config, get
from typer.testing import CliRunner

import tierloom
from tierloom.adapters.cli.commands import app

if TYPE_CHECKING:
    from pathlib import Path


def post(url: str, order: str, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/{order}", json=body, timeout=20, trust_env=False, headers=headers)


def run(*words: str) -> tuple[int, Any]:
    done = CliRunner().invoke(app, ["store", *words, "--json"])
    return done.exit_code, json.loads(done.stdout) if done.stdout else done.exception


def test_the_same_three_ways(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cold = {"use": "disk", "path": str(tmp_path), "capacity": "64 MiB"}
    with asked(config(hot=HOT, cold=cold)) as rig, tierloom.serve_http(rig.pipe) as door:
        for seed in range(4):
            rig.store(seed, chunks=2)
        counted = {"hot": 8, "cold": 8}
        by_call = tierloom.administer(rig.pipe, "clear", everything=True)
        by_http = post(door.url, "clear", {"everything": True}).json()
        code, by_command = run("clear", "--all", "--url", door.url)
        assert by_http["parts"] == by_command["parts"] == {"0": by_call}
        assert (by_http["order"], by_http["state"]) == ("clear", "done")
        assert code == 0
        assert by_call["dry_run"]
        assert {n: t["objects"] for n, t in by_call["tiers"].items()} == counted
        held = {n: t.stat().nbytes for n, t in rig.pipe.tiers.items()}
        assert {n: t["bytes"] for n, t in by_call["tiers"].items()} == held
        assert rig.retrieve(0, chunks=2).tokens == 128  # so far nothing is deleted
        caplog.clear()
        code, said = run("clear", "--all", "--yes", "--tier", "hot", "--url", door.url)
        assert (code, said["parts"]["0"]["objects"]) == (0, 8)
        (line,) = [r.getMessage() for r in caplog.records if r.name == "tierloom.admin"]
        assert line.startswith("admin: clear {'everything': True, 'tiers': ['hot']")
        assert rig.pipe.tiers["hot"].stat().objects == 0
        assert rig.pipe.tiers["cold"].stat().objects == 8


def test_prefetch_verifies_what_it_brings(tmp_path: Path) -> None:
    """Memory is trusted: what is damaged on the disk must not come there."""
    cold = {"use": "disk", "path": str(tmp_path), "capacity": "64 MiB"}
    with asked(config(hot=HOT, cold=cold)) as rig:
        for seed in range(3):
            rig.store(seed)
        keys = [e.key for e in rig.pipe.tiers["cold"].entries()]
        tierloom.administer(rig.pipe, "clear", everything=True, tiers=["hot"], dry_run=False)
        place = next(e.place for e in rig.pipe.tiers["cold"].entries() if e.key == keys[1])
        (segment,) = tmp_path.rglob("segment-00000.slab")
        with segment.open("r+b") as file:
            file.seek(place.pieces[0][0] + place.boundaries[0] + 100)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
        said = tierloom.administer(rig.pipe, "prefetch", chunks=[k.hex() for k in keys])
        assert said == {"there": 0, "objects": 2, "absent": 0, "refused": 1, "tokens": 0}
        held = {n: {e.key for e in t.entries()} for n, t in rig.pipe.tiers.items()}
        assert held == {"hot": {keys[0], keys[2]}, "cold": {keys[0], keys[2]}}
        assert rig.pipe.tiers["cold"].counts.corrupt == 1
        assert [rig.retrieve(seed).tokens for seed in range(3)] == [64, 0, 64]
        assert rig.pipe.arena.promises.spare == rig.pipe.arena.promises.total


def test_what_is_wrong_is_told_and_nothing_is_done() -> None:
    with asked(config()) as rig, tierloom.serve_http(rig.pipe) as door:
        rig.store(1)
        for order, body, why in [
            ("clear", {}, "either everything"),
            ("clear", {"everything": True, "model": "m"}, "either everything"),
            ("clear", {"older_than": "5", "dry_run": False}, "older_than"),
            ("clear", {"everything": True, "dryrun": False}, "dryrun"),
            ("clear", {"everything": True, "tiers": ["x"]}, "known: hot"),
            ("clear", {"chunks": ["abc"]}, "64 hex digits"),
            ("pin", {"owner": "o", "ttl": "1 s"}, "tokens or chunks"),
            ("pin", {"owner": "", "ttl": "1 s", "tokens": [1]}, "owner"),
            ("pin", {"owner": "o", "ttl": "1", "tokens": [1]}, "ttl"),
            ("log-level", {"level": "loud"}, "debug, info"),
            ("log-level", {"level": "info", "logger": "root"}, "logger"),
            ("log-level", {"level": "error", "logger": "tierloom.admin"}, "always logged"),
            ("bypass", {}, "tiers"),
        ]:
            said = post(door.url, order, body)
            assert said.status_code == 422, (order, body, said.text)
            assert why in said.text, (order, body, said.text)
        for raw in (b'{"on": "\\ud800"}', b'{"\\ud800": 1}', b"[" * 5000, b"\xff", b"", b"null"):
            said = httpx.post(
                f"{door.url}/v1/freeze", content=raw, trust_env=False, timeout=20,
                headers={"content-type": "application/json"},
            )  # fmt: skip
            assert said.status_code in (400, 422), (raw[:20], said.text)
        said = httpx.post(
            f"{door.url}/v1/pin", trust_env=False, timeout=20,
            content=b'{"owner": "o", "ttl": "1 s", "tokens": [1], "salt": "\\ud800"}',
            headers={"content-type": "application/json"},
        )  # fmt: skip
        assert (said.status_code, "lone surrogate" in said.text) == (422, True)
        assert rig.retrieve(1).tokens == 64
        code, error = run("freeze", "--tier", "x", "--url", door.url)
        assert code == 1
        assert isinstance(error, tierloom.ConfigError)
        with pytest.raises(tierloom.InputError, match="known: clear"):
            tierloom.administer(rig.pipe, "wipe")
        with pytest.raises(tierloom.InputError, match="clear has no 'al'"):
            tierloom.administer(rig.pipe, "clear", al=True)
    with pytest.raises(tierloom.Closed):
        tierloom.administer(rig.pipe, "usage")
    code, error = run("usage", "--url", door.url)
    assert isinstance(error, tierloom.TierDown)


def test_no_page_in_a_browser_and_nobody_without_the_token(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("secret")
    with asked(config()) as rig:
        rig.store(1)
        everything = {"everything": True, "dry_run": False}
        with tierloom.serve_http(rig.pipe) as door:
            assert post(door.url, "clear", everything, origin="http://evil").status_code == 403
            assert post(door.url, "clear", everything, host="evil").status_code == 403
            long = httpx.post(door.url + "/v1/clear", content=b" " * (9 << 20), trust_env=False)
            assert long.status_code == 413
            pieces = httpx.post(door.url + "/v1/clear", content=iter([b"{}"]), trust_env=False)
            assert pieces.status_code == 413
        with tierloom.serve_http(rig.pipe, token_file=str(file)) as door:
            assert post(door.url, "clear", everything).status_code == 401
            assert rig.retrieve(1).tokens == 64
            told = run("clear", "--all", "--yes", "--url", door.url, "--token-file", str(file))
            assert told[1]["parts"]["0"]["objects"] == 1


def test_drained_it_is_not_ready_and_takes_nothing_new() -> None:
    with asked(config()) as rig, tierloom.serve_http(rig.pipe) as door:
        rig.store(1)
        said = post(door.url, "drain", {}).json()["parts"]["0"]
        assert said["under_way"] == {"store": 0, "retrieve": 0}
        assert get(door.url, "/readyz").status_code == 503
        assert get(door.url, "/readyz").json()["reasons"] == ["it was ordered to drain"]
        assert rig.store(2).lost == {tierloom.Lost.REFUSED: 1}
        assert rig.retrieve(1).tokens == 64
        post(door.url, "freeze", {"on": False})  # does not end it
        assert rig.store(2).tokens == 0
        post(door.url, "drain", {"on": False})
        assert get(door.url, "/readyz").status_code == 200
        assert rig.store(2).tokens == 64


def test_usage_by_tenant_and_a_tenant_that_goes(caplog: pytest.LogCaptureFixture) -> None:
    import numpy as np

    with asked(config()) as rig:
        ids = np.arange(64, dtype=np.int32)
        rig.pipe.store(ids, rig.caches, ids, salt="early").wait()  # before anybody asked
        with tierloom.serve_http(rig.pipe) as door:
            for salt, n in {"a": 2, "b": 3}.items():
                for i in range(n):
                    rig.pipe.store(ids + i, rig.caches, ids, salt=salt).wait()
            usage = get(door.url, "/v1/usage").json()["parts"]["0"]
            assert sorted(t["objects"] for t in usage["tenants"].values()) == [1, 2, 3]
            assert usage["tenants"][""]["objects"] == 1
            (space,) = usage["namespaces"].values()
            assert (space["model"], space["objects"]) == ("test", 6)
            assert sum(t["bytes"] for t in usage["tenants"].values()) == space["bytes"]
            body = {"salt": "a", "dry_run": False}
            assert post(door.url, "clear", body).json()["parts"]["0"]["objects"] == 2
            assert not [r for r in caplog.records if "'a'" in r.getMessage()]
            assert rig.pipe.lookup(ids, salt="a") == 0
            assert rig.pipe.lookup(ids, salt="b") == 64
            assert rig.pipe.lookup(ids, salt="early") == 64
            assert post(door.url, "clear", {"salt": "early"}).json()["parts"]["0"]["objects"] == 0
            rig.pipe.retrieve(ids, rig.caches, ids, salt="early").wait()  # now it is known
            assert post(door.url, "clear", {"salt": "early"}).json()["parts"]["0"]["objects"] == 1


def test_the_log_level() -> None:
    with asked(config()) as rig, tierloom.serve_http(rig.pipe) as door:
        try:
            post(door.url, "log-level", {"level": "debug", "logger": "tierloom.x"})
            assert logging.getLogger("tierloom.x").level == logging.DEBUG
        finally:
            logging.getLogger("tierloom.x").setLevel(logging.NOTSET)
