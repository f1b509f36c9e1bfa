"""Dashboard and rules ask for what a real run exports, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import yaml
from door_rig import HOT, asked, config, get
from prometheus_client.parser import text_string_to_metric_families

import tierloom
from tierloom.adapters.door.collector import FiguresCollector, exposition
from tierloom.adapters.server.serve import Serving
from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.serve.listener import Listen

if TYPE_CHECKING:
    from servers import Certificates

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "observe"
SELECTOR = re.compile(r"\b(tierloom_[a-z_]+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)(=~|=)"([^"]*)"')
GROUPED = re.compile(r"\b(?:by|without) \(([^)]*)\)")
OF_PROMETHEUS = {"instance", "job"}


def rules() -> list[dict[str, Any]]:
    file = yaml.safe_load((FOLDER / "tierloom.rules.yaml").read_text())
    return [rule for group in file["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return list(json.loads((FOLDER / "grafana-dashboard.json").read_text())["panels"])


QUERIES = [(rule["alert"], rule["expr"]) for rule in rules()] + [
    (panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]
]


@pytest.fixture(scope="module")
def exported(
    certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, str]]]:
    """Names of series to their labels: of an engine's pipeline, and of a store with a client."""
    disk = {
        "use": "disk", "path": str(tmp_path_factory.mktemp("disk")), "capacity": "64 MiB",
        "segment": "16 MiB", "keep_free": "1 MiB",
    }  # fmt: skip
    files = {"cert": certificates.folder / "server.crt", "key": certificates.folder / "server.key"}
    texts: list[str] = []
    with asked(config(hot=HOT, warm=disk)) as rig:
        door = tierloom.serve_http(rig.pipe, "https://127.0.0.1:0", **files)
        rig.store(1), rig.retrieve(1)
        texts.append(get(door.url, "/metrics", verify=False).text)
        door.close()

    async def served() -> None:
        source = {"version": 1, "budget": {"arena": "8 MiB"}, "graphs": {}, "tiers": {"hot": HOT}}
        serving = Serving(load_config(source), [Listen.at("tcp://127.0.0.1:0")])
        stop = anyio.Event()

        def started(_: list[str]) -> None:
            serving.store.measure()
            said, _kind = exposition(FiguresCollector(lambda: {"store": serving.stats()}), "")
            texts.append(said.decode())
            stop.set()

        await serving.run(started, stop)

    anyio.run(served)
    found: dict[str, list[dict[str, str]]] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(dict(sample.labels))
    return found


@pytest.mark.parametrize(("title", "expr"), QUERIES, ids=[title for title, _ in QUERIES])
def test_a_query_names_what_is_exported(
    title: str, expr: str, exported: dict[str, list[dict[str, str]]]
) -> None:
    selectors = SELECTOR.findall(expr)
    assert selectors
    labels = set(OF_PROMETHEUS)
    for name, said in selectors:
        assert name in exported, f"{title}: nothing exports {name}"
        wanted = [(label, value) for label, _, value in MATCHER.findall(said)]
        wanted = [pair for pair in wanted if pair[0] not in OF_PROMETHEUS]
        assert any(all(s.get(k) == v for k, v in wanted) for s in exported[name]), (title, name)
        labels |= {label for sample in exported[name] for label in sample}
    for group in GROUPED.findall(expr):
        assert set(re.split(r", *", group)) <= labels, title
    assert expr.count("(") == expr.count(")")
    if "_bucket" in expr:
        assert "histogram_quantile" in expr


def test_each_rule_says_what_is_to_be_done() -> None:
    for rule in rules():
        assert set(rule["annotations"]) == {"summary", "runbook"}
        used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        for group in GROUPED.findall(rule["expr"]):
            assert used <= set(re.split(r", *", group)), rule["alert"]


def test_the_alerts_and_the_scrape_file() -> None:
    names = {rule["alert"].removeprefix("Tierloom") for rule in rules()}
    assert names >= {"TierDown", "HitRateFell", "RegretHigh", "Drops", "DiskFull"}
    assert "CertificateEnds" in names
    said = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert [(FOLDER / name).is_file() for name in said["rule_files"]] == [True]
