"""What right files mean: bases, overrides, variables, sources and defaults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from tierloom.pipeline.config.load import load_config, warnings
from tierloom.pipeline.config.presets import presets
from tierloom.pipeline.config.problems import ConfigProblems

CONFIGS = Path(str(resources.files("tierloom") / "configs"))
BASE = """
    version: 1
    name: base
    tiers:
      hot:  {use: 'standins:ArenaBox', capacity: 1 MiB}
      cold: {use: 'standins:Box', capacity: 2 MiB, timeout: 150 ms}
    graphs:
      store:
        stages:
          keys: {use: hash}
          plan: {use: lookup, want: absent}
          pack: {use: gather}
          hot:  {use: put, tier: hot}
          host: {use: to_host, from: pack}
          cold: {use: put, tier: cold, when_full: drop}
"""


@pytest.fixture
def base(checker):
    checker.write(BASE, "base.yaml")
    return checker


def sources(spec, graph="store"):
    return {n.id: n.source for n in spec.graphs[graph].nodes}


def test_without_from_a_stage_reads_the_nearest_readable_one_above(base) -> None:
    assert sources(load_config("base.yaml")) == {
        "keys": None, "plan": "keys", "pack": "plan", "hot": "pack", "host": "pack", "cold": "host",
    }  # fmt: skip


def test_defaults_and_shared_options(base) -> None:
    spec = load_config("base.yaml")
    assert (spec.name, spec.source) == ("base", "base.yaml")
    assert (spec.order, spec.verify) == ("auto", "always")
    assert spec.tiers["cold"].breaker.timeout == 0.15
    assert spec.tiers["cold"].options.capacity == 2 << 20
    nodes = {n.id: n for n in spec.graphs["store"].nodes}
    assert nodes["cold"].wire.when_full == "drop"
    assert nodes["cold"].place == "base.yaml:14:7"
    assert str(nodes["host"].gives) == "kv@host/frame"


def test_extends_merges_by_id_and_null_removes(base) -> None:
    base.write(
        """
        version: 1
        extends: ./base.yaml
        tiers: {hot: {capacity: 4 MiB}, cold: null}
        graphs: {store: {deadline: 1 s, stages: {cold: null, host: null}}}
        """
    )
    spec = load_config(Path("p.yaml"))
    assert list(spec.tiers) == ["hot"]
    assert spec.tiers["hot"].options.capacity == 4 << 20
    assert spec.graphs["store"].options.deadline == 1.0
    assert list(sources(spec)) == ["keys", "plan", "pack", "hot"]


def test_another_use_replaces_the_whole_entry(base) -> None:
    base.write(
        """
        version: 1
        extends: ./base.yaml
        tiers: {cold: {use: memory, capacity: 1 MiB}}
        """
    )
    assert load_config("./p.yaml").tiers["cold"].breaker.timeout == 2.0


def test_a_stage_can_be_put_between_two_of_the_base(base) -> None:
    base.write(
        """
        version: 1
        extends: ./base.yaml
        graphs: {store: {stages: {small: {use: zstd, from: host}, cold: {from: small}}}}
        """
    )
    spec = load_config("./p.yaml")
    assert sources(spec)["cold"] == "small"
    order = list(sources(spec))
    assert order.index("host") < order.index("small") < order.index("cold")


def test_a_problem_of_the_base_points_into_the_base(base) -> None:
    base.write(BASE.replace("want: absent", "want: nothing"), "base.yaml")
    base.write("version: 1\nextends: ./base.yaml\ntiers: {hot: {capacity: many}}")
    with pytest.raises(ConfigProblems) as caught:
        load_config("./p.yaml")
    assert [f"{p.file}:{p.line}:{p.col}" for p in caught.value.problems] == [
        "base.yaml:10:33",
        "p.yaml:3:25",
    ]


def test_overrides_win_and_are_checked(base) -> None:
    spec = load_config(
        "base.yaml", {"tiers.hot.capacity": "3 MiB", "budget.threads": 2, "name": "x"}
    )
    assert (spec.tiers["hot"].options.capacity, spec.budget.threads) == (3 << 20, 2)
    assert spec.name == "x"
    with pytest.raises(ConfigProblems) as caught:
        load_config(
            "base.yaml", {"tiers.hto.capacity": 1, "tiers.hot.capacty": 1, "budget.threads": "2"}
        )
    assert [str(p) for p in caught.value.problems] == [
        "<overrides>: tiers.hto.capacity: no 'hto' in tiers\n    hint: did you mean 'hot'?",
        "<overrides>: budget.threads: wants a whole number, got '2'",
        "<overrides>: tiers.hot: unknown key 'capacty'\n    hint: did you mean 'capacity'?",
    ]


def test_what_is_in_no_file_stands_where_the_user_wrote_it(base) -> None:
    for source, wrong in (
        ("base.yaml", {"tiers.hot.capacty": 1}),
        ({"version": 1, "extends": "minimal", "tiers": {"hot": {"capacty": 1}}}, {}),
        ("bsae", {}),
    ):
        with pytest.raises(ConfigProblems, match=r"^the launcher: (tiers.hot|no preset)"):
            load_config(source, wrong, said_in="the launcher")


def test_variables(base, monkeypatch) -> None:
    text = BASE.replace("2 MiB", "'${BOX:-5 MiB}'").replace("name: base", "name: ${A_NAME:-9}")
    base.write(text, "base.yaml")
    spec = load_config("base.yaml")
    assert (spec.name, spec.tiers["cold"].options.capacity) == ("9", 5 << 20)
    monkeypatch.setenv("BOX", "77")
    monkeypatch.setenv("A_NAME", "")
    spec = load_config("base.yaml")
    assert (spec.name, spec.tiers["cold"].options.capacity) == ("9", 77)


def test_a_mapping_is_a_source_too() -> None:
    spec = load_config(
        {"version": 1, "extends": "minimal", "tiers": {"hot": {"capacity": "1 MiB"}}}
    )
    assert (spec.name, spec.source) == ("minimal", "<mapping>")
    with pytest.raises(ConfigProblems, match=r"^<mapping>: tiers.hot.capacity: 'x' is not a s"):
        load_config({"version": 1, "extends": "minimal", "tiers": {"hot": {"capacity": "x"}}})


def test_anchors_share_a_value(base) -> None:
    base.write(BASE.replace("1 MiB", "&c 1 MiB").replace("2 MiB", "*c"), "base.yaml")
    assert {t.options.capacity for t in load_config("base.yaml").tiers.values()} == {1 << 20}


def test_aliases_do_not_blow_up(checker) -> None:
    bomb = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40))
    assert checker.problems(f"version: 1\na0: &a0 x\n{bomb}")


def test_tiers_that_a_graph_leaves_out_are_warned_of(base) -> None:
    spec = load_config("base.yaml", {"tiers.spare": {"use": "standins:Box"}})
    assert [(p.path, p.message) for p in warnings(spec)] == [
        ("tiers.spare", "graph 'store' keeps nothing in it")
    ]


@pytest.mark.parametrize("name", presets())
def test_the_presets_are_right(name) -> None:
    spec = load_config(name)
    assert (spec.name, warnings(spec)) == (name, ())


@pytest.mark.parametrize("base", sorted((CONFIGS / "bases").iterdir()), ids=lambda b: b.name)
def test_a_base_is_no_preset_and_says_what_it_lacks(base) -> None:
    assert base.stem not in presets()
    with pytest.raises(ConfigProblems) as caught:
        load_config(base)
    assert {p.message for p in caught.value.problems} == {"there is no tier 'cold'"}


def test_checking_imports_nothing_heavy() -> None:
    code = (
        "import sys, json; from tierloom.pipeline.config.load import load_config\n"
        "for name in ('minimal', 'redis', 's3', 'nixl-posix', 'nixl-obj', 'gds'):\n"
        "    load_config(name)\n"
        "heavy = 'torch numba triton redis obstore nixl nixl_cu12 kvikio'.split()\n"
        "print(json.dumps([m for m in heavy if m in sys.modules]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert json.loads(run.stdout) == []
