"""Who has how much of a prompt: what the controller says is what engines have."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from control_rig import FleetRig, fleet as fleet_of, ids_of, until
from door_rig import HOT
from typer.testing import CliRunner

import tierloom
from tierloom.adapters.cli.commands import app
from tierloom.adapters.controller.run_control import ControlDoor, ControlOptions

if TYPE_CHECKING:
    from pathlib import Path

KV = 2 * 4 * 2 * 8 * 2
"""Bytes of a token: K and V, 4 layers, 2 heads of 8 values in bfloat16."""


def run(*words: str) -> tuple[int, Any]:
    done = CliRunner().invoke(app, ["control", *words, "--json"])
    return done.exit_code, json.loads(done.stdout) if done.stdout else done.exception


def test_what_engines_have_is_found(fleet: FleetRig, tmp_path: Path) -> None:
    disk = {"use": "disk", "path": str(tmp_path / "d"), "capacity": "64 MiB"}
    one, two = fleet.engine("one"), fleet.engine("two", tiers={"hot": HOT, "cold": disk})
    ids = ids_of(1)
    fleet.store(one, ids)
    fleet.store(two, ids[:128])
    until(lambda: fleet.tokens(tokens=ids) == {"one": 192, "two": 128})
    said = fleet.ask("/v1/lookup", {"tokens": ids, "model": "m"})
    assert said == {
        "tokens": 192,
        "instances": {
            "one": {"tokens": 192, "bytes": 192 * KV, "tiers": {"hot": 192}, "workers": 1},
            "two": {"tokens": 128, "bytes": 128 * KV, "tiers": {"hot": 128, "cold": 128},
                    "workers": 1},
        },
    }  # fmt: skip
    two.tiers["hot"].bypassed = True  # no more than a hint: the directory is not told of it
    tierloom.administer(two, "clear", everything=True, tiers=["hot"], dry_run=False)
    until(lambda: fleet.ask("/v1/lookup", {"tokens": ids})["instances"]["two"]["tiers"]
          == {"cold": 128})  # fmt: skip
    keys = [key.hex() for key, _ in one.find(ids)]
    assert fleet.tokens(chunks=keys) == {"one": 192, "two": 128}
    assert fleet.tokens(tokens=ids, model="other") == {}
    assert fleet.tokens(tokens=ids, salt="s") == {}
    assert fleet.tokens(tokens=ids[1:]) == {}
    code, told = run("lookup", "--tokens", ",".join(map(str, ids)), "--url", fleet.door.url)
    assert (code, told["instances"]["one"]["tokens"]) == (0, 192)
    assert run("lookup", "--tokens", "1,2,3", "--url", fleet.door.url)[0] == 1
    one.close()
    until(lambda: fleet.tokens(tokens=ids) == {"two": 128})
    until(lambda: list(fleet.ask("/v1/instances")) == ["two"])


def test_salts_tags_and_tails(rig: FleetRig) -> None:
    one, ids = rig.engine("one"), ids_of(2)
    rig.store(one, ids, salt="a", tags={"k": "v"})
    rig.store(one, ids_of(3)[:150])
    until(lambda: rig.tokens(tokens=ids, salt="a", tags={"k": "v"}) == {"one": 192})
    until(lambda: rig.tokens(tokens=ids_of(3)[:150]) == {"one": 150})
    assert rig.tokens(tokens=ids_of(3)) == {"one": 128}  # its last chunk is another
    assert rig.tokens(tokens=ids, salt="a") == {}


def test_an_engine_of_two_shares_has_what_both_have(rig: FleetRig) -> None:
    """Each rank names chunks by the whole model, and keeps its heads of it."""
    ids = ids_of(4)
    ranks = [rig.engine("tp", heads=(2 * r, 2 * r + 2)) for r in range(2)]
    for rank in ranks:
        rank.seeded_by(rank.whole(4, 4))
    chain = ranks[0].whole(4, 4)
    import numpy as np

    from tierloom.stages.kv.prefix import Chain

    def put(rank: tierloom.Pipeline, n: int) -> None:
        links = Chain(chain.digest, 16)
        links.extend(np.array(ids[:n], np.int32))
        span = links.span(0, n // 16)
        assert rank.store(span, rig.caches, np.arange(n)).wait().tokens == n

    put(ranks[0], 192)
    until(lambda: len(rig.ask("/v1/instances/tp/workers")) == 2)
    assert rig.tokens(tokens=ids) == {}
    put(ranks[1], 128)
    until(lambda: rig.tokens(tokens=ids) == {"tp": 128})
    hit = rig.ask("/v1/lookup", {"tokens": ids})["instances"]["tp"]
    assert (hit["bytes"], hit["workers"]) == (128 * 2 * KV, 2)


def test_why_nothing_is_found(rig: FleetRig) -> None:
    def why(path: str, body: Any = None) -> dict[str, list[str]]:
        found: dict[str, list[str]] = rig.ask("/v1/explain" + path, body)["reasons"]
        return found

    assert "no heartbeat" in why("")[""][0]
    one, ids = rig.engine("one", weights="w1"), ids_of(5)
    rig.store(one, ids, salt="a")
    until(lambda: rig.tokens(tokens=ids, salt="a") == {"one": 192})
    asked = {"tokens": ids, "model": "m"}
    assert why("", asked | {"salt": "a"}) == {}
    assert "nobody stored" in why("", asked)["one"][0]
    rig.store(one, ids_of(6))
    until(lambda: rig.tokens(tokens=ids_of(6)) == {"one": 192})
    assert "other salt" in why("", {"tokens": ids_of(6), "salt": "b"})["one"][0]
    assert "other tags" in why("", {"tokens": ids_of(6), "tags": {"x": "y"}})["one"][0]
    assert "other model" in why("", asked | {"model": "n"})["one"][0]
    assert "has 10 tokens" in why("", {"tokens": ids[:10]})["one"][0]
    for query, said in [
        ("weights=w2", "other weights"), ("dtype=float16", "other dtype"),
        ("chunk=256", "other chunk: it has '64'"),
    ]:  # fmt: skip
        assert said in why("?" + query)["one"][0]
    assert "no heartbeat of two" in why("?instance=two")[""][0]
    assert why("?chunk=64&dtype=bfloat16&weights=w1&model=m") == {}
    code, told = run("explain", "--tokens", "1,2", "--url", rig.door.url)
    assert (code, list(told["reasons"])) == (0, ["one"])


def test_text_by_the_models_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 5, "b": 6}, unk_token="a"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    with fleet_of("redis", tmp_path, tokenizers={"m": tmp_path}) as rig:
        one = rig.engine("one")
        rig.store(one, [5, 6] * 64)
        until(lambda: rig.tokens(text="a b " * 64, model="m") == {"one": 128})
        refused = rig.raw("/v1/lookup", {"text": "a", "model": "n"})
        assert (refused.status_code, "--tokenizer" in refused.text) == (422, True)
    with pytest.raises(tierloom.ConfigError, match="no tokenizer"):
        ControlDoor(ControlOptions(directory="redis://h", tokenizers={"m": tmp_path / "x"}))


def test_instances_workers_and_health(rig: FleetRig) -> None:
    one = rig.engine("one", door=True)
    rig.engine("two", model="n")
    until(lambda: rig.ask("/v1/instances").get("one", {}).get("door", "") != "")
    until(lambda: set(rig.ask("/v1/instances")) == {"one", "two"})
    said = rig.ask("/v1/instances")["one"]
    assert (said["model"], said["workers"], said["tiers"]) == ("m", 1, ["hot"])
    assert said["addresses"] == [one.serves_at]
    (worker,) = rig.ask("/v1/instances/one/workers").values()
    assert worker["namespace"] == one.names.digest.hex()
    assert rig.raw("/v1/instances/none/workers").status_code == 422
    assert rig.ask("/v1/health") == {
        "status": "ready", "instances": {"one": "ready", "two": "alive"},
    }  # fmt: skip
    tierloom.administer(one, "drain")
    assert rig.ask("/v1/health")["instances"]["one"] == "unready"
    assert run("health", "--url", rig.door.url)[0] == 1
    assert "tierloom_control_instances 2.0" in rig.raw("/metrics").text


def test_a_directory_that_is_away(tmp_path: Path) -> None:
    nowhere = ControlOptions(directory="redis://127.0.0.1:1/0", port=0)
    with ControlDoor(nowhere).start() as door:
        import httpx

        said = httpx.get(door.url + "/readyz", trust_env=False, timeout=20)
        assert (said.status_code, said.json()["reasons"]) == (
            503, ["the directory does not answer"],
        )  # fmt: skip
        for path, body in [("/v1/lookup", {"tokens": [1]}), ("/v1/explain", {"tokens": [1]})]:
            said = httpx.post(door.url + path, json=body, trust_env=False, timeout=20)
            assert said.status_code == 503, said.text
        assert httpx.get(door.url + "/livez", trust_env=False).status_code == 200
        assert httpx.get(door.url + "/v1/health", trust_env=False).json()["status"] == "unready"
        assert httpx.get(door.url + "/metrics", trust_env=False).status_code == 200


def test_who_may_come_in() -> None:
    with pytest.raises(tierloom.ConfigError, match="can be reached from other hosts"):
        ControlDoor(ControlOptions(directory="redis://127.0.0.1:1/0", host="0.0.0.0"))
    with pytest.raises(tierloom.ConfigError, match="it would be empty"):
        ControlDoor(ControlOptions(directory="embedded"))
