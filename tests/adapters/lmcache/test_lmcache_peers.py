"""LMCache's two instances that share by P2P, as its guide configures them: converted, and run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from peer_process import EngineProcess, engine
from processes import free_port
from servers import redis

from tierloom.adapters.lmcache.convert import convert, yaml_text
from tierloom.adapters.lmcache.options import Given, from_file
from tierloom.pipeline.config.load import load_config

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
GUIDE = [HERE / f"p2p_instance{n}.yaml" for n in (1, 2)]


def made(given: Given) -> tuple[str, dict[str, Any], list[str]]:
    """The text, the YAML of it, and what is said to be missing."""
    draft = convert(given)
    text = yaml_text(draft, given, "lmcache.yaml")
    return text, yaml.safe_load(text), draft.missing


def of(**options: Any) -> Given:
    return Given({"enable_p2p": True, **options}, "lmcache.yaml")


@pytest.mark.parametrize(("n", "port"), [(1, 8200), (2, 8202)])
def test_the_guides_instances(n: int, port: int) -> None:
    text, tree, missing = made(from_file(GUIDE[n - 1]))
    directory = "${TIERLOOM_DIRECTORY:-redis://localhost:6379/0}"
    assert tree["serve"] == {
        "listen": f"localhost:{port}", "tiers": ["hot"], "directory": directory,
        "instance": f"lmcache_instance_{n}",
    }  # fmt: skip
    assert tree["tiers"]["near"]["directory"] == [directory]
    assert tree["graphs"]["retrieve"]["stages"]["plan"]["tiers"] == ["hot", "near"]
    assert [s for s in tree["graphs"]["store"]["stages"] if s.startswith("put")] == ["put_hot"]
    assert "in place of LMCache's controller run a Redis or Valkey at localhost:6379" in text
    assert "p2p_lookup_ports are not used" in text
    assert "TIERLOOM_TOKEN" not in text
    assert [line for line in missing if "controller" not in line] == []


@pytest.fixture
def instances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EngineProcess]]:
    """The two of the guide, at ports that are free and with less memory, over a real Redis."""
    ports = [free_port() for _ in GUIDE]
    with redis() as server:
        monkeypatch.setenv("TIERLOOM_DIRECTORY", f"redis://127.0.0.1:{server.port}/0")
        files = []
        for file, port in zip(GUIDE, ports, strict=True):
            raw = yaml.safe_load(file.read_text()) | {"p2p_init_ports": port}
            _, tree, _ = made(Given(raw | {"max_local_cpu_size": 0.0625}, file.name))
            files.append(tree | {"budget": {"arena": "16 MiB"}})
        with engine(tmp_path / "1", files[0]) as one, engine(tmp_path / "2", files[1]) as two:
            assert [e.url.rpartition(":")[2] for e in (one, two)] == [str(p) for p in ports]
            yield [one, two]


@pytest.mark.server
def test_the_second_finds_what_the_first_computed(instances: list[EngineProcess]) -> None:
    first, second = instances
    assert first.stores(1, tokens=512) == 512
    assert come(second, 1) == {"tokens": 512, "tiers": {"near": 2}}
    assert come(second, 1) == {"tokens": 512, "tiers": {"hot": 2}}
    first.kill()
    assert come(second, 1) == {"tokens": 512, "tiers": {"hot": 2}}
    assert second.tell(retrieve=2, tokens=512)["tokens"] == 0


def come(asker: EngineProcess, seed: int, seconds: float = 20.0) -> dict[str, Any]:
    """What a retrieve brings, asked again until it brings something."""
    end = time.monotonic() + seconds
    while True:
        got: dict[str, Any] = asker.tell(retrieve=seed, tokens=512)
        if got["tokens"] or time.monotonic() > end:
            return got
        time.sleep(0.05)


def test_ranks_and_other_hosts() -> None:
    text, tree, _ = made(of(p2p_host="10.0.0.2", p2p_init_ports=[8200, 8204]))
    assert tree["serve"]["listen"] == "10.0.0.2:0"
    assert tree["serve"]["directory"].endswith("redis://10.0.0.2:6379/0}")
    assert "each rank serves at a port that is free" in text
    assert "set TIERLOOM_TOKEN" in text
    assert "instance" not in tree["serve"]


def test_peers_are_asked_after_what_is_here_and_before_a_store() -> None:
    _, tree, _ = made(of(local_disk="/data/kv", max_local_disk_size=5, remote_url="redis://h:1"))
    assert list(tree["tiers"]) == ["hot", "warm", "near", "cold"]
    assert tree["serve"]["tiers"] == ["hot", "warm"]
    puts = [s for s in tree["graphs"]["store"]["stages"] if s.startswith("put")]
    assert puts == ["put_hot", "put_warm", "put_cold"]
    assert "tiers" not in tree["graphs"]["store"]["stages"]["fresh"]


def test_what_is_shared_is_kept_in_memory() -> None:
    text, tree, _ = made(of(local_cpu=False, remote_url="redis://h:1", store_location="P2PBackend"))
    assert tree["serve"]["tiers"] == ["hot"]
    assert "KV is kept there, too" in text
    assert list(tree["tiers"]) == ["hot", "near", "cold"]
    assert [s for s in tree["graphs"]["store"]["stages"] if "put" in s] == ["put_hot", "put_cold"]


def test_a_channel_is_a_wire_where_the_tier_has_one() -> None:
    text, tree, _ = made(of(transfer_channel="nixl"))
    assert tree["tiers"]["near"].get("wire") == "auto" or "# transfer_channel: nixl: auto" in text
    assert "wire" not in made(of())[1]["tiers"]["near"]


def test_without_p2p_nothing_is_shared(tmp_path: Path) -> None:
    text, tree, missing = made(of(enable_p2p="false", p2p_host="h", lmcache_instance_id="a"))
    assert ("serve" in tree, "near" in tree["tiers"], missing) == (False, False, [])
    for name in ("p2p_host", "lmcache_instance_id"):
        assert f"# - {name}: " in text
    (tmp_path / "l.yaml").write_text(text)
    assert load_config(tmp_path / "l.yaml").serve is None
