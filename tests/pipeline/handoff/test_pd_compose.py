"""configs/deploy/docker-compose.pd.yaml: what it says to engines and proxy is what they read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tierloom.adapters.vllm.exchange.settings import configured
from tierloom.pipeline.config import load as check
from tierloom.pipeline.config.load import warnings

FILE = Path(__file__).resolve().parents[3] / "configs" / "deploy" / "docker-compose.pd.yaml"
ROLES = {"prefiller": "kv_producer", "decoder": "kv_both"}


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load(FILE.read_text())["services"]
    return made


@pytest.fixture
def spec_of(services: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pipeline of an engine, in the surroundings that it has there."""
    monkeypatch.setattr(check, "memory_here", lambda: 1 << 40)

    def read(name: str) -> Any:
        for variable, value in services[name]["environment"].items():
            monkeypatch.setenv(variable, value)
        transfer = json.loads(value_of(services[name]["command"], "--kv-transfer-config"))
        assert transfer["kv_connector"] == "TierloomConnector"
        assert transfer["kv_role"] == ROLES[name]
        spec = configured(transfer["kv_connector_extra_config"]).pipeline()
        assert not warnings(spec)
        assert spec.name == name
        return spec

    return read


def value_of(words: list[str], flag: str) -> str:
    """Of `--flag VALUE` or `--flag=VALUE`."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == flag:
            return value if equals else following
    raise AssertionError(f"no {flag} in {words}")


def test_the_decoder_may_dial_what_the_prefiller_says_of_itself(
    services: dict[str, Any], spec_of: Any
) -> None:
    serve, handoff = spec_of("prefiller").serve, spec_of("decoder").handoff
    assert serve.listen == "0.0.0.0:7655"
    assert serve.advertise == "prefiller", "the name of the service, by which others reach it"
    assert serve.advertise in services
    assert (serve.advertise, 0) in handoff.named
    secret = f"/run/secrets/{services['prefiller']['secrets'][0]}"
    assert serve.token_file == handoff.token_file == secret


def test_each_engine_has_a_gpu_and_a_disk_of_its_own(
    services: dict[str, Any], spec_of: Any
) -> None:
    gpus, disks = [], []
    for name in ROLES:
        devices = services[name]["deploy"]["resources"]["reservations"]["devices"]
        gpus += devices[0]["device_ids"]
        (kept,) = (v for v in services[name]["volumes"] if v.startswith("kv"))
        disks.append(kept.partition(":")[0])
        assert str(spec_of(name).tiers["warm"].options.path).startswith(kept.partition(":")[2])
        assert services[name]["build"]["target"] == "vllm"
    assert len(set(gpus)) == len(set(disks)) == len(ROLES)
    assert set(disks) == yaml.safe_load(FILE.read_text())["volumes"].keys()
