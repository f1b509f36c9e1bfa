"""Each kind of problem: where it points, what it says, what it advises."""

from __future__ import annotations

import pytest

from tierloom.pipeline.config.resolve import installed_by
from tierloom.stages import catalog

KNOWN = f"known: {', '.join(sorted(catalog.STAGES))}"

STORE = """
version: 1
tiers: {{hot: {{use: memory, capacity: 1 MiB}}}}
graphs:
  store:
    stages:
      keys:  {{use: hash}}
      {0}
      fresh: {{use: lookup}}
      pack:  {{use: gather}}
      hot:   {{use: put, tier: hot}}
"""
"""Lines 6 to 10 are stages; the case stands in line 7, from column 7 on."""

STAGES = {
    "an unknown stage": (
        "x: {use: lokup}", "7:16", "graphs.store.stages.x", "no stage is called 'lokup'",
        "did you mean 'lookup'?",
    ),
    "an unknown key": (
        "x: {use: lookup, wnat: absent}", "7:24", "graphs.store.stages.x", "unknown key 'wnat'",
        "did you mean 'want'?",
    ),
    "no use": (
        "x: {want: absent}", "7:7", "graphs.store.stages.x", "does not say which stage to use",
        KNOWN,
    ),
    "use is no word": (
        "x: {use: [hash]}", "7:16", "graphs.store.stages.x.use",
        "wants the name of a stage, got a list",
        KNOWN,
    ),
    "a module that is not there": (
        "x: {use: 'nowhere_at_all:X'}", "7:16", "graphs.store.stages.x",
        "stage 'nowhere_at_all:X' cannot be loaded: No module named 'nowhere_at_all'",
        "install the package that has the Python module 'nowhere_at_all'",
    ),
    "a class that is not there": (
        "x: {use: 'standins:X'}", "7:16", "graphs.store.stages.x",
        ("stage 'standins:X' cannot be loaded: "
         "AttributeError: module 'standins' has no attribute 'X'"), "",
    ),
    "not a stage": (
        "x: {use: 'standins:NO_STAGE'}", "7:16", "graphs.store.stages.x",
        "'standins:NO_STAGE' is not a stage", "a stage subclasses Stage",
    ),
    "a missing option": (
        "x: {use: 'standins:Sorts'}", "7:7", "graphs.store.stages.x", "option 'must' is missing",
        "This one has no default.",
    ),
    "an option that the class refuses": (
        "x: {use: 'standins:Sorts', must: 10}", "7:7", "graphs.store.stages.x",
        "must may be 9 at most, got 10", "",
    ),
    "int": (
        "x: {use: 'standins:Sorts', must: high}", "7:40", "graphs.store.stages.x.must",
        "wants a whole number, got 'high'", "",
    ),
    "int, not bool": (
        "x: {use: 'standins:Sorts', must: true}", "7:40", "graphs.store.stages.x.must",
        "wants a whole number, got true", "",
    ),
    "float": (
        "x: {use: 'standins:Sorts', must: 1, number: [1]}", "7:51", "graphs.store.stages.x.number",
        "wants a number, got a list", "",
    ),
    "str": (
        "x: {use: 'standins:Sorts', must: 1, word: 5}", "7:49", "graphs.store.stages.x.word",
        "wants text, got 5", "put it in quotes",
    ),
    "bool, of YAML 1.2": (
        "x: {use: 'standins:Sorts', must: 1, flag: yes}", "7:49", "graphs.store.stages.x.flag",
        "wants true or false, got 'yes'", "",
    ),
    "literal": (
        "x: {use: 'standins:Sorts', must: 1, mode: smal}", "7:49", "graphs.store.stages.x.mode",
        "wants one of fast, small, got 'smal'", "did you mean 'small'?",
    ),
    "one of two types": (
        "x: {use: 'standins:Sorts', must: 1, direct: yes}", "7:51", "graphs.store.stages.x.direct",
        "wants true or false or auto, got 'yes'", "",
    ),
    "size": (
        "x: {use: 'standins:Sorts', must: 1, size: 3 GiBs}", "7:49", "graphs.store.stages.x.size",
        "'3 GiBs' is not a size; write one as in '64 GiB' or '500 MB'", "",
    ),
    "time": (
        "x: {use: 'standins:Sorts', must: 1, wait: soon}", "7:49", "graphs.store.stages.x.wait",
        "'soon' is not a time; write one as in '150 ms' or '24 h'", "",
    ),
    "list": (
        "x: {use: 'standins:Sorts', must: 1, names: a}", "7:50", "graphs.store.stages.x.names",
        "wants a list, got 'a'", "write it in brackets: [a, b]",
    ),
    "item of a list": (
        "x: {use: 'standins:Sorts', must: 1, names: [a, 2]}", "7:54",
        "graphs.store.stages.x.names[1]", "wants text, got 2", "put it in quotes",
    ),
    "an option of the wire": (
        "x: {use: lookup, depth: 0}", "7:7", "graphs.store.stages.x",
        "depth and width must be at least 1", "",
    ),
    "when_full": (
        "x: {use: lookup, when_full: dorp}", "7:35", "graphs.store.stages.x.when_full",
        "wants one of block, drop, spill, got 'dorp'", "did you mean 'drop'?",
    ),
    "a source that is not there": (
        "x: {use: lookup, from: key}", "7:30", "graphs.store.stages.x",
        "there is no stage 'key' to read", "did you mean 'keys'?",
    ),
    "a source that is no word": (
        "x: {use: lookup, from: [keys]}", "7:30", "graphs.store.stages.x.from",
        "wants the id of a stage, got a list", "",
    ),
    "a source that gives nothing": (
        "x: {use: lookup, from: hot}", "7:30", "graphs.store.stages.x",
        "'hot' gives only a receipt, which cannot be read", "read the stage that it reads",
    ),
    "a stage that reads itself": (
        "x: {use: lookup, from: x}", "7:30", "graphs.store.stages.x", "reads itself: x <- x",
        "let one of them read a stage outside the circle",
    ),
    "a port that does not fit": (
        "x: {use: decode, from: keys}", "7:7", "graphs.store.stages.x",
        "keys gives keys@host/request but decode takes any@any/frame (unit differs)", "",
    ),
    "a port in which two words differ": (
        "x: {use: 'standins:ToRemote', from: keys}", "7:7", "graphs.store.stages.x",
        ("keys gives keys@host/request but standins:ToRemote takes bytes@device/frame "
         "(kind and place and unit differ)"), "",
    ),
    "a kind of stage that its ports contradict": (
        "x: {use: 'standins:WrongKind', from: keys}", "7:7", "graphs.store.stages.x",
        "standins:WrongKind gives keys@host/request, so it must be a RequestStage",
        "subclass that, or correct takes and gives",
    ),
    "a tier that is not there": (
        "x: {use: lookup, tiers: [hot, cold]}", "7:37", "graphs.store.stages.x.tiers",
        "there is no tier 'cold'", "known: hot",
    ),
    "an id": ("a.b: {use: lookup}", "7:7", "graphs.store.stages", "'a.b' is not an id",
              "letters, digits, '-' and '_', a letter first"),
    "a stage that is no mapping": (
        "x: lookup", "7:7", "graphs.store.stages.x", "wants a mapping, got 'lookup'", "",
    ),
    "nothing to remove": (
        "x: null", "7:7", "graphs.store.stages.x", "wants a mapping, got nothing",
        "there is no 'x' to remove",
    ),
    "a key that occurs twice": (
        "keys: {use: hash}", "7:7", "graphs.store.stages",
        "key 'keys' occurs twice, first in line 6", "",
    ),
    "a tag": (
        "x: {use: !!python/name:os.system lookup}", "7:16", "graphs.store.stages.x.use",
        "tag 'tag:yaml.org,2002:python/name:os.system' is not allowed", "write plain values",
    ),
    "a variable": (
        "x: {use: lookup, worth: '${TIERLOOM_NOT_SET}'}", "7:31", "graphs.store.stages.x.worth",
        "environment variable TIERLOOM_NOT_SET is not set",
        "set it, or give a default: ${TIERLOOM_NOT_SET:-value}",
    ),
    "a variable that is not closed": (
        "x: {use: lookup, worth: '${A'}", "7:31", "graphs.store.stages.x.worth",
        "'${A' has a variable that is not closed or not a name",
        "write ${NAME} or ${NAME:-default}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STAGES.values(), ids=STAGES.keys())
def test_a_problem_of_a_stage(checker, case) -> None:
    line, place, path, message, hint = case
    problems = checker.problems(STORE.format(line))
    assert (f"./p.yaml:{place}", path, message, hint) in {
        (f"./{p.file}:{p.line}:{p.col}", p.path, p.message, p.hint) for p in problems
    }, "\n".join(map(str, problems))


@pytest.mark.parametrize(
    ("module", "hint"), [("yaml", "pip install pyyaml"), ("obstore", "pip install 'tierloom[s3]'")]
)
def test_a_missing_module_is_told_by_its_package(module: str, hint: str) -> None:
    assert installed_by(module) == hint
