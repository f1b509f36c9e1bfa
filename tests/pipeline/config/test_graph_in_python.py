"""Graphs written in Python: the checks of a file, and the same graph after YAML."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tierloom import graphs, presets
from tierloom.graphs import Graph, Step, get, lookup, pipeline_yaml, put, zstd
from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.config.spec import PipelineSpec
from tierloom.stages.errors import ConfigError, InputError

STORE = (
    Graph(deadline="3 s")
    >> "hash"
    >> lookup("absent")
    >> "gather"
    >> "to_host"
    >> (put("hot"), zstd(level=1) >> put("warm", when_full="drop"))
)
TIERS = {t: {"use": "memory", "capacity": "1 MiB"} for t in ("hot", "warm")}


def spec_of(graph: Graph, **more: Any) -> PipelineSpec:
    return load_config({"version": 1, "tiers": TIERS, "graphs": {"store": graph}, **more})


def same(a: PipelineSpec, b: PipelineSpec) -> bool:
    """But for where it was written."""

    def plain(spec: PipelineSpec) -> Any:
        graphs = {
            n: (g.options, tuple(replace(node, place="") for node in g.nodes))
            for n, g in spec.graphs.items()
        }
        tiers = {n: replace(t, place=None) for n, t in spec.tiers.items()}  # type: ignore[arg-type]
        return replace(spec, source="", graphs=graphs, tiers=tiers)  # type: ignore[arg-type]

    return bool(plain(a) == plain(b))


def test_a_graph_is_what_a_file_says() -> None:
    text = """
        deadline: 3 s
        stages:
          hash: {use: hash}
          lookup: {use: lookup, want: absent}
          gather: {use: gather}
          to_host: {use: to_host}
          hot: {use: put, tier: hot}
          zstd: {use: zstd, level: 1}
          warm: {use: put, tier: warm, when_full: drop}
    """
    written = {"version": 1, "tiers": TIERS, "graphs": {"store": yaml.safe_load(text)}}
    assert same(spec_of(STORE), load_config(written))
    readers = [n.id for n in spec_of(STORE).graphs["store"].readers("to_host")]
    assert readers == ["hot", "zstd"]


def test_branches_of_a_fork_read_what_is_before_it() -> None:
    graph = Graph() >> "hash" >> lookup("absent") >> "gather" >> "to_host"
    graph = graph >> (zstd() >> put("warm"), put("hot"))
    sources = {n.id: n.source for n in spec_of(graph).graphs["store"].nodes}
    assert (sources["zstd"], sources["hot"]) == ("to_host", "to_host")
    assert graph["stages"]["hot"]["from"] == "to_host"


@pytest.mark.parametrize("name", presets())
def test_every_preset_there_and_back(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierloom.pipeline.config.load.memory_here", lambda: 1 << 40)
    for variable in ("TIERLOOM_DIRECTORY", "TIERLOOM_URL"):
        monkeypatch.delenv(variable, raising=False)
    spec = load_config(name)
    file = tmp_path / "all.yaml"
    file.write_text(pipeline_yaml(spec))
    assert "extends" not in file.read_text()
    assert same(load_config(file), spec)
    for kind in spec.graphs:
        graph = Graph.of(spec, kind)
        again = Graph.parse(graph.yaml())
        assert again == graph
        whole = yaml.safe_load(file.read_text())
        whole["graphs"][kind] = again
        assert same(load_config(whole), spec)


def test_values_keep_their_meaning(tmp_path: Path) -> None:
    """Times, rates, inner tiers, and words that another YAML takes for numbers."""
    tiers = {
        "a": {"use": "audit", "of": {"use": "files", "path": "/x y"}, "timeout": "150 us"},
        "hot": {"use": "memory", "capacity": "1 MiB", "probe": "90 s"},
        "warm": {"use": "files", "path": "1e3"},
    }
    serve = {"tiers": ["hot"], "limit": "3 MiB/s", "token_file": "0x10", "instance": "no"}
    spec = spec_of(STORE, tiers=tiers, serve=serve)
    file = tmp_path / "all.yaml"
    file.write_text(pipeline_yaml(spec))
    assert same(load_config(file), spec)


def test_mistakes_are_found_where_they_are_written() -> None:
    for wrong, words in {
        lambda: lookup("absnet"): "wants one of prefix, absent, anywhere",
        lambda: zstd(levle=3): "did you mean 'level'?",
        lambda: zstd(level=99): "level must lie in 1..19",
        lambda: put(): "option 'tier' is missing",
        lambda: put("hot", tier="hot"): "option 'tier' is given twice",
        lambda: put("hot", "warm"): "has 1 options, and was given 2 values",
        lambda: Graph() >> "gahter": "did you mean 'gather'?",
        lambda: Graph(deadlin="1 s"): "did you mean 'deadline'?",
        lambda: STORE >> "gather": "nothing can be read after a fork",
        lambda: Graph() >> (put("hot") >> "gather"): "'gather' has nothing to read",
        lambda: Graph.of("shared", "store"): "has no graph 'store'",
        lambda: Graph.parse("stages: 1"): "a graph is a mapping with `stages`",
    }.items():
        with pytest.raises(ConfigError) as caught:
            wrong()
        assert words in str(caught.value)
    with pytest.raises(InputError, match="is not a stage"):
        Graph() >> 7  # type: ignore[operator]
    with pytest.raises(AttributeError, match="no stage is called 'zsdt'"):
        graphs.zsdt  # noqa: B018


def test_the_whole_is_checked_like_a_file() -> None:
    with pytest.raises(ConfigError) as caught:
        (Graph() >> "hash" >> lookup("absent") >> "gather" >> zstd() >> put("warm")).check()
    assert "'to_host' between them" in str(caught.value)
    with pytest.raises(ConfigError, match="no stage reads what it gives"):
        (Graph() >> "hash").check()
    assert STORE.check() is STORE
    loads = Graph() >> "hash" >> lookup(tiers=["hot"]) >> get("hot") >> "decode" >> "scatter"
    assert loads.check("retrieve") is loads


def test_a_graph_never_changes_and_names_are_its_own() -> None:
    before = dict(STORE["stages"])
    first = Graph() >> "hash" >> lookup("absent") >> "gather" >> "to_host"
    one, two = first >> zstd() >> zstd() >> put("hot"), first >> put("hot")
    assert list(one["stages"])[-3:] == ["zstd", "zstd-2", "hot"]
    assert list(two["stages"])[-1] == "hot"
    assert len(first["stages"]) == 4
    assert STORE["stages"] == before
    assert (first >> put("hot", id="last"))["stages"]["last"] == {"use": "put", "tier": "hot"}


def test_how_it_is_shown() -> None:
    assert repr(STORE) == "<Graph of hash, lookup, gather, to_host, hot, zstd, warm>"
    assert repr(zstd(level=1) >> put("x")) == "zstd(level=1) >> put(tier='x')"
    assert STORE._repr_html_().startswith("<svg")
    assert "no stage reads" in (Graph() >> Step("hash"))._repr_html_()
