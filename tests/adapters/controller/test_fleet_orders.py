"""Orders to engines: each is done once, whoever sends it again, and says what came of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from control_rig import FleetRig, ids_of, until
from typer.testing import CliRunner

import tierloom
from tierloom.adapters.cli.commands import app
from tierloom.adapters.controller.run_control import ControlDoor, ControlOptions

if TYPE_CHECKING:
    from collections.abc import Iterator


def with_doors(rig: FleetRig, *names: str, **more: Any) -> list[tierloom.Pipeline]:
    made = [rig.engine(name, door=True, **more) for name in names]
    until(
        lambda: [i["door"] != "" for i in rig.ask("/v1/instances").values()] == [True] * len(made)
    )
    return made


def send(rig: FleetRig, order: str, to: Any, body: Any, key: str = "", **more: Any) -> Any:
    said = rig.raw(
        f"/v1/{order}", {"instances": to, "body": body} | more, headers={"Idempotency-Key": key}
    )
    assert said.status_code == 200, said.text
    return said.json()


def test_an_order_is_done_once(rig: FleetRig, caplog: pytest.LogCaptureFixture) -> None:
    """Sent three times, by two controllers, one of which was not there the first time."""
    one, two = with_doors(rig, "one", "two")
    for pipe in (one, two):
        rig.store(pipe, ids_of(1))
    body = {"everything": True, "dry_run": False}
    first = send(rig, "clear", ["*"], body, "k1")
    assert (first["id"], first["state"]) == ("one,two~k1", "done")
    assert [i["parts"]["0"]["objects"] for i in first["instances"].values()] == [3, 3]
    rig.store(one, ids_of(2))
    assert send(rig, "clear", ["*"], body, "k1") == first
    with ControlDoor(ControlOptions(directory=rig.directory, port=0)).start() as other:
        rig.door.close()
        rig.door = other
        assert send(rig, "clear", ["*"], body, "k1") == first
        assert rig.ask("/v1/orders/one,two~k1")["instances"] == first["instances"]
        assert one.lookup(ids_of(2)) == 192  # what came later is there
        assert len([r for r in caplog.records if "admin: clear" in r.getMessage()]) == 2
        told = send(rig, "clear", ["one"], body | {"dry_run": True}, "k1")
        assert told["state"] == "failed"
        assert "another order" in told["instances"]["one"]["detail"]
        pin = {"tokens": ids_of(2), "owner": "me", "ttl": "1 h"}
        said = send(rig, "pin", ["one"], pin)["instances"]["one"]["parts"]["0"]
        assert (said["objects"], said["tokens"]) == (3, 192)


def test_what_is_wrong_is_refused_before_it_is_sent(rig: FleetRig) -> None:
    with_doors(rig, "one")
    for order, body, why in [
        ("clear", {"instances": ["none"], "body": {"everything": True}}, "no heartbeat"),
        ("clear", {"instances": ["one"], "body": {}}, "either everything"),
        ("clear", {"instances": [], "body": {"everything": True}}, "at least one"),
        ("pin", {"instances": ["one"], "body": {"owner": "o"}}, "ttl"),
        ("freeze", {"instances": ["one"], "deadline": "9"}, "deadline"),
        ("move", {"source": "one", "target": "one", "tokens": [1]}, "are one"),
        ("lookup", {"tokens": [1 << 31]}, "32 bits"),
        ("lookup", {"tokens": [1], "text": "a"}, "one of"),
    ]:
        said = rig.raw(f"/v1/{order}", body)
        assert (said.status_code, why in said.text) == (422, True), said.text
    rig.engine("closed")
    until(lambda: len(rig.ask("/v1/instances")) == 2)
    told = send(rig, "freeze", ["closed"], {})
    assert (told["state"], "no door" in told["instances"]["closed"]["detail"]) == ("failed", True)
    assert list(send(rig, "freeze", ["*"], {})["instances"]) == ["one"]


@pytest.mark.parametrize("copy", [True, False])
def test_a_move_loses_nothing(rig: FleetRig, copy: bool) -> None:
    source, target = with_doors(rig, "a", "b", reads=True)
    ids = ids_of(3, chunks=6)
    rig.store(source, ids)
    until(lambda: rig.tokens(tokens=ids) == {"a": 384})
    body = {"source": "a", "target": "b", "tokens": ids, "copy": copy}
    said = rig.ask("/v1/move", body)
    assert (said["state"], said["chunks"], said["moved"], said["tokens"]) == ("done", 6, 6, 384)
    fetched = said["steps"]["prefetch"]["instances"]["b"]["parts"]["0"]
    assert (fetched["objects"], fetched["absent"]) == (6, 0)
    assert target.lookup(ids) == 384
    assert source.lookup(ids) == 384 * copy
    assert tierloom.administer(target, "pins")["owners"] == {}
    until(lambda: rig.tokens(tokens=ids) == {"b": 384} | ({"a": 384} if copy else {}))
    blank = [cache.clone().zero_() for cache in rig.caches]
    at = np.arange(384)
    got = target.retrieve(ids, blank, at).wait()
    assert got.delivered == {"hot": 384} if hasattr(got, "delivered") else got.tokens == 384
    for there, here in zip(rig.caches, blank, strict=True):
        assert (there[:, :24] == here[:, :24]).all()


def test_what_the_target_cannot_keep_stays_at_the_source(rig: FleetRig) -> None:
    """Half of a tier can be pinned: of 6 chunks that come, 2 are sure to stay."""
    source = with_doors(rig, "a", reads=True)[0]
    small = {"hot": {"use": "memory", "capacity": 4 * 20 << 10}}
    target = rig.engine("b", door=True, reads=True, tiers=small)
    until(lambda: rig.ask("/v1/instances").get("b", {}).get("door", "") != "")
    ids = ids_of(4, chunks=6)
    rig.store(source, ids)
    until(lambda: rig.tokens(tokens=ids) == {"a": 384})
    said = rig.ask("/v1/move", {"source": "a", "target": "b", "tokens": ids})
    assert (said["state"], said["chunks"], said["moved"]) == ("done", 6, 2)
    kept = {e.key for pipe in (source, target) for e in pipe.tiers["hot"].entries()}
    assert len(kept) == 6
    assert source.tiers["hot"].stat().objects == 4


def test_by_command(rig: FleetRig) -> None:
    one, two = with_doors(rig, "one", "two", reads=True)
    rig.store(one, ids_of(7))
    until(lambda: rig.tokens(tokens=ids_of(7)) == {"one": 192})

    def run(*words: str) -> tuple[int, Any]:
        done = CliRunner().invoke(app, ["control", *words, "--url", rig.door.url, "--json"])
        return done.exit_code, json.loads(done.stdout) if done.stdout else done.exception

    code, said = run("move", "one", "two", "--tokens", ",".join(map(str, ids_of(7))), "--key", "m")
    assert (code, said["moved"]) == (0, 3)
    assert (one.lookup(ids_of(7)), two.lookup(ids_of(7))) == (0, 192)
    code, said = run("order", "two~m.pin")
    assert (code, said["instances"]["two"]["parts"]["0"]["held"]) == (0, "111")
    code, said = run("clear", "--to", "one", "--to", "two", "--all", "--yes")
    assert [i["parts"]["0"]["objects"] for i in said["instances"].values()] == [0, 3]
    assert run("order", "one~none")[0] == 1
    code, error = run("clear", "--to", "one")
    assert (code, "either everything" in str(error)) == (1, True)


ENGINE = """
import sys, time, numpy, torch, tierloom
sys.path.append(sys.argv[2])
from door_rig import HOT, config
caches = [torch.randn(2, 40, 16, 2, 8).to(torch.bfloat16) for _ in range(4)]
layout = tierloom.KVLayout.from_tensors(caches, order="2BNHD")
serve = {"tiers": ["hot"], "directory": sys.argv[1], "instance": "child"}
pipe = tierloom.open(config() | {"serve": serve}, layout=layout, model="m")
tierloom.serve_http(pipe)
print("open", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def child(rig: FleetRig) -> Iterator[subprocess.Popen[str]]:
    door_rig = str(Path(__file__).parents[1] / "door")
    made = subprocess.Popen(
        [sys.executable, "-c", ENGINE, rig.directory, door_rig], stdout=subprocess.PIPE, text=True
    )
    try:
        assert made.stdout is not None
        assert made.stdout.readline() == "open\n"
        until(lambda: rig.ask("/v1/instances").get("child", {}).get("door", "") != "")
        yield made
    finally:
        made.kill()
        made.wait(20)
        if made.stdout is not None:
            made.stdout.close()


def test_an_engine_that_leaves_while_it_is_at_it(rig: FleetRig) -> None:
    """The order does not wait for its deadline."""
    (one,) = with_doors(rig, "one")
    go, told = threading.Event(), []
    one._portal.post(go.wait)
    body = {"everything": True}
    asking = threading.Thread(
        target=lambda: told.append(send(rig, "clear", ["one"], body, "k", deadline="500 s"))
    )
    asking.start()
    try:
        until(lambda: rig.raw("/v1/orders/one~k").json().get("state") in ("running", "lost"))
        one._worker.serving.close()
        asking.join(20)
        assert not asking.is_alive()
    finally:
        go.set()
    assert (told[0]["state"], told[0]["instances"]["one"]["detail"]) == ("lost", "it has ended")


@pytest.mark.campaign
def test_an_engine_that_stops_or_dies(rig: FleetRig, child: subprocess.Popen[str]) -> None:
    """What it was told it may have done: the order says so, and does not wait for its deadline."""
    assert send(rig, "freeze", ["child"], {}, "k")["state"] == "done"
    os.kill(child.pid, signal.SIGSTOP)
    told = send(rig, "clear", ["child"], {"everything": True}, deadline="500 s")
    assert told["state"] == "lost"
    assert "ended" in told["instances"]["child"]["detail"]
    assert rig.ask("/v1/orders/child~k")["state"] == "lost"
    os.kill(child.pid, signal.SIGKILL)
    said = rig.raw("/v1/clear", {"instances": ["child"], "body": {"everything": True}})
    assert said.status_code == 422


def test_doors_that_lie(rig: FleetRig) -> None:
    """A record may name any address: what answers there is no door, or not at all."""
    one = rig.engine("one")
    for url in (rig.door.url + "/x", "http://127.0.0.1:1", "ftp://h"):
        one.introduce(door=url)
        until(lambda url=url: rig.ask("/v1/instances").get("one", {}).get("door", "") == url)
        told = rig.raw("/v1/freeze", {"instances": ["one"]})
        assert told.status_code in (200, 422)
        if told.status_code == 200:
            assert told.json()["state"] in ("failed", "lost")
        assert httpx.get(rig.door.url + "/livez", trust_env=False).status_code == 200
        assert rig.ask("/v1/health")["instances"]["one"] == "silent"
