"""configs/deploy: what files say to one another is what each of them reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from deployed import (
    COMPOSED,
    FOLDER,
    commands,
    composed,
    flags_of,
    manifests,
    transfer_of,
    unit,
    value_of,
)
from typer.testing import CliRunner

from tierloom.adapters.cli.commands import app
from tierloom.adapters.server.deploy import DEPLOYMENTS
from tierloom.adapters.vllm.exchange.settings import configured
from tierloom.pipeline.config import load as check
from tierloom.stages.tiers.net.address import Address

USER = "10001"
COMMANDS = list(commands())
ENGINES = [
    (file, name)
    for file in COMPOSED
    for name, service in yaml.safe_load(file.read_text())["services"].items()
    if transfer_of(service)
]


def test_the_files_are_seen() -> None:
    assert [c.of for c in COMMANDS if c.words[0] == "serve"] == [
        "docker-compose.central.yaml store", "docker-compose.yaml tierloom", "kubernetes.yaml",
        "tierloom.service",
    ]  # fmt: skip
    assert len([c for c in COMMANDS if c.words[0] == "proxy"]) == 2
    assert len(ENGINES) == 8


@pytest.mark.parametrize("command", COMMANDS, ids=[c.of for c in COMMANDS])
def test_flags_and_variables_are_those_that_exist(command) -> None:
    known = flags_of(command.words[0])
    own = command.words[: command.words.index("--")] if "--" in command.words else command.words
    assert {word.partition("=")[0] for word in own if word.startswith("-")} - {"--"} <= set(known)
    read = {
        name
        for folder in ("configs", "stages", "pipeline", "adapters")
        for path in (FOLDER.parents[1] / folder).rglob("*")
        if path.suffix in (".py", ".yaml") and path.parent != FOLDER
        for name in re.findall(r"TIERLOOM_[A-Z_]+", path.read_text())
    }
    ours = {name for name in command.environment if name.startswith("TIERLOOM_")}
    own = set(re.findall(r"\$\{(TIERLOOM_[A-Z]+)\}", unit()["ExecStart"][0]))
    assert ours - own <= read


@pytest.mark.parametrize("file", COMPOSED, ids=[f.name for f in COMPOSED])
def test_services_find_one_another(file: Path) -> None:
    whole = composed(file)
    services = whole["services"]
    targets = set(re.findall(r"FROM .* AS (\S+)", (FOLDER / "Dockerfile").read_text()))
    published: list[str] = []
    for name, service in services.items():
        for volume in service.get("volumes", ()):
            source = volume.rpartition("}:")[0] or volume.split(":")[0]
            if source.startswith("."):
                assert (FOLDER / source).is_file()
            elif not source.startswith("${"):
                assert source in whole["volumes"], name
        for secret in service.get("secrets", ()):
            assert secret in whole["secrets"]
        for config in service.get("configs", ()):
            assert yaml.safe_load(whole["configs"][config["source"]]["content"])["apiVersion"] == 1
        assert set(service.get("depends_on", ())) <= services.keys()
        for other, asked in dict.fromkeys(service.get("depends_on", ())).items():
            asked = service["depends_on"]
            if isinstance(asked, dict) and asked[other]["condition"] == "service_healthy":
                assert "healthcheck" in services[other]
        if "build" in service:
            assert service["build"]["context"] == "."
            assert service["build"]["target"] in targets
            assert (service["user"], service["cap_drop"]) == (USER, ["ALL"])
        said = " ".join(map(str, service.get("command", ())))
        if "/run/secrets/" in said:
            assert {*re.findall(r"/run/secrets/(\w+)", said)} <= {*service["secrets"]}
        published += service.get("ports", ())
    hosts = [port.rpartition(":")[0] for port in published]
    assert all(host.startswith("127.0.0.1:") for host in hosts)
    assert len(set(hosts)) == len(hosts)


@pytest.mark.parametrize(("file", "name"), ENGINES, ids=[f"{f.stem} {n}" for f, n in ENGINES])
def test_an_engine_is_told_what_it_reads(
    file: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = composed(file)["services"]
    engine = services[name]
    monkeypatch.setattr(check, "memory_here", lambda: 1 << 40)
    for variable, value in engine["environment"].items():
        monkeypatch.setenv(variable, value)
    transfer = transfer_of(engine)
    assert transfer["kv_connector"] == "TierloomConnector"
    assert transfer["kv_load_failure_policy"] == "recompute"
    spec = configured(transfer["kv_connector_extra_config"]).pipeline()
    assert not check.warnings(spec)
    (port,) = value_of(engine["command"], "--port")
    for line in engine.get("ports", ()):
        assert line.endswith(f":{port}")
    for tier in spec.tiers.values():
        url = getattr(tier.options, "url", "")
        if "://" not in url:
            continue
        at = Address.parse(url, urlsplit(url).scheme)
        served = services[at.host]["command"]
        assert any(word.endswith((f":{at.port}", f"port={at.port}")) for word in served)
    if "warm" in spec.tiers:
        (kept,) = (v for v in engine["volumes"] if not v.startswith("${"))
        assert str(spec.tiers["warm"].options.path).startswith(kept.partition(":")[2])


def test_central_is_what_lmcache_users_have() -> None:
    services = composed(FOLDER / "docker-compose.central.yaml")["services"]
    store = services["store"]
    assert (store["cpus"], store["mem_limit"]) == (4, "8g")
    assert "--listen=tcp://0.0.0.0:65432" in store["command"]
    spec = configured(transfer_of(services["engine-1"])["kv_connector_extra_config"]).pipeline()
    store_graph = {n.id: n for n in spec.graphs["store"].nodes}
    assert store_graph["small"].use == "cachegen"
    assert store_graph["cold"].source == "small"
    ports = [services[f"engine-{i}"]["ports"][0] for i in (1, 2)]
    assert ports == ["127.0.0.1:8080:8080", "127.0.0.1:8081:8081"]


def test_mooncake_is_what_lmcache_users_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "memory_here", lambda: 1 << 40)
    services = composed(FOLDER / "docker-compose.mooncake.yaml")["services"]
    master = services["master"]["command"]
    for flag, port in (
        ("--rpc_port", "50052"), ("--http_metadata_server_port", "8080"), ("--metrics_port", "9004")
    ):  # fmt: skip
        assert value_of(master, flag) == [port]
    for name, port, role in (
        ("prefiller", "8100", "kv_producer"), ("decoder", "8200", "kv_consumer")
    ):  # fmt: skip
        transfer = transfer_of(services[name])
        spec = configured(transfer["kv_connector_extra_config"]).pipeline()
        pool = spec.tiers["pool"].options
        assert (transfer["kv_role"], spec.chunk.tokens, pool.segment) == (role, 16, 30 << 30)
        assert pool.metadata == "http://master:8080/metadata"
        assert value_of(services[name]["command"], "--port") == [port]
    assert value_of(services["proxy"]["command"], "--port") == ["9000"]


@pytest.mark.parametrize("name", ["pd", "mooncake"])
def test_a_proxy_asks_the_engines_of_its_file(name: str) -> None:
    services = composed(FOLDER / f"docker-compose.{name}.yaml")["services"]
    words = services["proxy"]["command"]
    for flag, engine in (("--prefill", "prefiller"), ("--decode", "decoder")):
        (url,) = map(urlsplit, value_of(words, flag))
        assert (url.hostname, str(url.port)) == (
            engine, value_of(services[engine]["command"], "--port")[0]
        )  # fmt: skip
    published = [port for service in services.values() for port in service.get("ports", ())]
    assert [p.rpartition(":")[2] for p in published] == value_of(words, "--port")


def test_prometheus_scrapes_what_listens() -> None:
    services = composed(FOLDER / "docker-compose.observed.yaml")["services"]
    said = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    for job in said["scrape_configs"]:
        for target in job["static_configs"][0]["targets"]:
            name, _, port = target.partition(":")
            words = services[name]["command"]
            assert any(w.endswith((f":{port}", f"port={port}")) for w in words), target
    secret = said["scrape_configs"][0]["authorization"]["credentials_file"]
    assert secret.rpartition("/")[2] in services["prometheus"]["secrets"]
    mounted = {v.split(":")[1]: v.split(":")[0] for v in services["prometheus"]["volumes"]}
    for rules in said["rule_files"]:
        assert mounted[f"/etc/prometheus/{rules}"] == f"../observe/{rules}"
    assert "/etc/prometheus/prometheus.yml" in mounted


def test_manifests_name_one_another() -> None:
    by_kind: dict[str, Any] = {m["kind"]: m for m in manifests()}
    assert set(by_kind) == {
        "Service", "StatefulSet", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor"
    }  # fmt: skip
    template = by_kind["StatefulSet"]["spec"]["template"]
    labels, pod = template["metadata"]["labels"], template["spec"]
    service = by_kind["Service"]["spec"]
    assert service["selector"] == labels
    assert by_kind["StatefulSet"]["spec"]["serviceName"] == by_kind["Service"]["metadata"]["name"]
    for kind, key in (
        ("StatefulSet", "selector"), ("PodDisruptionBudget", "selector"),
        ("NetworkPolicy", "podSelector"), ("PodMonitor", "selector"),
    ):  # fmt: skip
        assert by_kind[kind]["spec"][key]["matchLabels"] == labels, kind
    (container,) = pod["containers"]
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    assert {p["targetPort"]: p["port"] for p in service["ports"]} == ports
    for flag, name in (("--listen", "store"), ("--http", "http")):
        (at,) = value_of(container["args"], flag)
        assert at.endswith(f":{ports[name]}")
    probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness")}
    assert {p["path"] for p in probes.values()} == {"/livez"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    rules = by_kind["NetworkPolicy"]["spec"]["ingress"]
    assert {p["port"] for rule in rules for p in rule["ports"]} == set(ports)
    (endpoint,) = by_kind["PodMonitor"]["spec"]["podMetricsEndpoints"]
    (secret,) = (v["secret"] for v in pod["volumes"] if v["name"] == "token")
    assert endpoint["port"] in ports
    assert endpoint["authorization"]["credentials"]["name"] == secret["secretName"]
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    (token,) = value_of(container["args"], "--token-file")
    assert token == f"{mounts['token']}/{endpoint['authorization']['credentials']['key']}"
    (claim,) = by_kind["StatefulSet"]["spec"]["volumeClaimTemplates"]
    environment = {e["name"]: e["value"] for e in container["env"]}
    assert environment["TIERLOOM_DIR"].startswith(mounts[claim["metadata"]["name"]])
    assert pod["securityContext"]["runAsNonRoot"]
    assert str(pod["securityContext"]["runAsUser"]) == USER
    assert secret["defaultMode"] == 0o440
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]


def test_no_image_runs_as_root() -> None:
    users: dict[str, str] = {}
    parent = ""
    for line in (FOLDER / "Dockerfile").read_text().splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            parent = name
            users[name] = users.get(base, "root")
        elif word == "USER":
            users[parent] = rest
    assert set(users.values()) == {USER}


def test_the_unit_is_told_of(tmp_path: Path) -> None:
    said = unit()
    assert (said["Type"], said["NotifyAccess"]) == (["notify"], ["main"])
    assert int(said["WatchdogSec"][0]) > 1
    (credential,) = said["LoadCredential"]
    assert f"%d/{credential.partition(':')[0]}" in said["ExecStart"][0]
    assert "AF_UNIX" in said["RestrictAddressFamilies"][0], "it tells systemd by such a socket"


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_files_are_written_as_they_are(name: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["deploy", name, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for file in DEPLOYMENTS[name]:
        assert (tmp_path / file).read_bytes() == (FOLDER.parent / file).read_bytes()
    first = tmp_path / DEPLOYMENTS[name][0]
    for source in re.findall(r"^ +- (\.[^:]*):", first.read_text(), re.MULTILINE):
        assert (first.parent / source).is_file(), "what it mounts is beside it"
    assert name in CliRunner().invoke(app, ["deploy"]).stdout


def test_every_file_is_one_of_a_deployment() -> None:
    told = {file for files in DEPLOYMENTS.values() for file in files}
    there = {f"deploy/{p.name}" for p in FOLDER.iterdir() if p.name != "README.md"}
    assert there <= told
    readme = (FOLDER / "README.md").read_text()
    assert not [path for path in there if f"`{path.partition('/')[2]}`" not in readme]
    assert not [name for name in DEPLOYMENTS if f"| `{name}` |" not in readme]
