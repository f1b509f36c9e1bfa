"""configs/deploy/docker-compose.cluster.yaml: what it says to its engines is what they read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from tierloom.adapters.vllm.exchange.settings import configured
from tierloom.pipeline.config import load as check
from tierloom.pipeline.config.load import warnings
from tierloom.stages.directory.shared.named import named_directory

FILE = Path(__file__).resolve().parents[3] / "configs" / "deploy" / "docker-compose.cluster.yaml"
ENGINES = ("engine-1", "engine-2")


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return made


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_serves_and_reads_what_the_other_serves(
    composed: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = composed["services"][name]
    for variable, value in engine["environment"].items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(check, "memory_here", lambda: 1 << 40)
    words = engine["command"]
    transfer = json.loads(words[words.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector"] == "TierloomConnector"
    spec = configured(transfer["kv_connector_extra_config"]).pipeline()
    assert not warnings(spec)
    assert spec.name == "cluster"
    assert spec.serve is not None
    near = spec.tiers["near"].options
    assert (spec.serve.listen, spec.serve.advertise) == ("0.0.0.0:7655", "auto")
    secret = f"/run/secrets/{engine['secrets'][0]}"
    assert spec.serve.token_file == near.token_file == secret
    assert engine["secrets"][0] in composed["secrets"]
    assert near.addresses == [spec.serve.directory]
    assert named_directory(spec.serve.directory)
    host = urlsplit(spec.serve.directory).hostname
    assert host in composed["services"]
    assert engine["depends_on"] == {host: {"condition": "service_healthy"}}
    assert engine["build"]["target"] == "vllm"
    (kept,) = (v for v in engine["volumes"] if v.startswith("kv"))
    volume, _, path = kept.partition(":")
    assert volume in composed["volumes"]
    assert str(spec.tiers["warm"].options.path).startswith(path)


def test_engines_differ_in_what_must_not_be_shared(composed: dict[str, Any]) -> None:
    one, two = (composed["services"][name] for name in ENGINES)
    differ = {key for key in one if one[key] != two[key]}
    assert differ == {"ports", "volumes", "deploy"}
    published = [port for e in (one, two) for port in e["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in published)
    assert "ports" not in composed["services"]["redis"], "it asks for no password"
