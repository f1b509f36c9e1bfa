"""Problems of a file as a whole, of its shape, and how they are told."""

from __future__ import annotations

from textwrap import dedent

import pytest
from hypothesis import given, settings, strategies as st

from tierloom.pipeline.config import load as check
from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.config.presets import presets
from tierloom.pipeline.config.problems import ConfigProblems
from tierloom.stages.errors import ConfigError

TIERS = "tiers: {hot: {use: memory, capacity: 1 MiB}, box: {use: 'standins:Box'}}"
HEAD = f"version: 1\n{TIERS}\ngraphs:\n"

FILES = {
    "empty": ("", "1:1", "", "is empty", "begin with 'version: 1'"),
    "no mapping": ("[1]", "1:1", "", "a pipeline is a mapping", "begin with 'version: 1'"),
    "not YAML": (
        "version: 1\nname: [a\n", "3:1", "",
        "not YAML: expected ',' or ']', but got '<stream end>'", "while parsing a flow sequence",
    ),
    "no version": (
        "name: x", "1:1", "version", "is missing", "begin the file with 'version: 1'",
    ),
    "another version": (
        "version: 2", "1:10", "version", "is not 1",
        "this tierloom reads 'version: 1'; a newer file needs a newer tierloom",
    ),
    "no graphs": (
        "version: 1", "1:1", "graphs", "is missing", "describe store or retrieve, or both",
    ),
    "another graph": (
        HEAD + "  stroe: {stages: {}}", "4:3", "graphs.stroe", "there is no graph 'stroe'",
        "did you mean 'store'?",
    ),
    "no stages": (HEAD + "  store: {}", "4:3", "graphs.store", "has no stages", ""),
    "a key of the file": (
        "version: 1\nteirs: {}", "2:1", "", "unknown key 'teirs'", "did you mean 'tiers'?",
    ),
    "a key that is no word": ("version: 1\n? [a]\n: 1", "2:3", "", "a key must be a word", ""),
    "a key of chunk": (
        "version: 1\nchunk: {token: 5}", "2:9", "chunk", "unknown key 'token'",
        "did you mean 'tokens'?",
    ),
    "grain": (
        "version: 1\nchunk: {tokens: 5, grain: 2}", "2:1", "chunk",
        "grain 2 does not divide tokens 5", "",
    ),
    "a tier": (
        "version: 1\ntiers: {hot: {use: memroy}}", "2:20", "tiers.hot",
        "no tier is called 'memroy'", "did you mean 'memory'?",
    ),
    "a tier that is a stage": (
        "version: 1\ntiers: {hot: {use: 'standins:Sorts'}}", "2:20", "tiers.hot",
        "'standins:Sorts' is not a tier", "a tier subclasses Tier",
    ),
    "an option of a tier": (
        "version: 1\ntiers: {hot: {use: 'standins:Box', capcity: 1}}", "2:36", "tiers.hot",
        "unknown key 'capcity'", "did you mean 'capacity'?",
    ),
    "a breaker": (
        "version: 1\ntiers: {hot: {use: 'standins:Box', fails: 0}}", "2:9", "tiers.hot",
        "fails, timeout and probe must be positive", "",
    ),
    "tiers that are a list": (
        "version: 1\ntiers: [hot]", "2:8", "tiers", "wants a mapping of ids, got a list", "",
    ),
    "an option of a graph": (
        HEAD + "  store: {deadline: 0 s, stages: {}}", "4:3", "graphs.store",
        "deadline must be greater than 0", "",
    ),
    "an option of pace": (
        HEAD + "  store: {pace: {by: layers}, stages: {}}", "4:22", "graphs.store.pace.by",
        "wants one of layer, request, got 'layers'", "did you mean 'layer'?",
    ),
    "pace that is no mapping": (
        HEAD + "  store: {pace: layer, stages: {}}", "4:17", "graphs.store.pace",
        "wants a mapping, got 'layer'", "",
    ),
    "an output that nobody reads": (
        HEAD + "  store: {stages: {keys: {use: hash}}}", "4:20", "graphs.store.stages.keys",
        "no stage reads what it gives (keys@host/request)",
        "remove it, or let a stage read it with 'from: keys'",
    ),
    "a first stage that does not take tokens": (
        HEAD + "  store: {stages: {pack: {use: gather}}}", "4:20", "graphs.store.stages.pack",
        "the request gives tokens@host/request but gather takes plan@host/request (kind differs)",
        "",
    ),
    "a missing bridge": (
        HEAD + "  store: {stages: {fresh: {use: lookup}}}", "4:20", "graphs.store.stages.fresh",
        "the request gives tokens@host/request but lookup takes keys@host/request (kind differs)",
        "put 'hash' between them",
    ),
    "a circle": (
        HEAD + "  store: {stages: {a: {use: hash}, b: {use: lookup, from: d}, c: {use: gather},"
        " d: {use: to_host}}}",
        "4:59", "graphs.store.stages.b", "reads itself: b <- d <- c <- b",
        "let one of them read a stage outside the circle",
    ),
    "a promotion to what is not memory": (
        HEAD + "  retrieve: {stages: {a: {use: get, promote: box}}}", "4:46",
        "graphs.retrieve.stages.a.promote", "tier 'box' does not keep its objects in memory",
        "known: hot",
    ),
    "a codec in retrieve": (
        HEAD + "  retrieve: {stages: {a: {use: zstd}}}", "4:23", "graphs.retrieve.stages.a",
        "zstd encodes, which only 'store' does",
        "'decode' undoes whatever codec an object was written with",
    ),
    "a codec of heads over opaque blocks": (
        (
            "version: 1\norder: native\ntiers: {hot: {use: memory, capacity: 1 MiB}}\ngraphs:\n"
            "  store: {stages: {k: {use: hash}, l: {use: lookup}, g: {use: gather},"
            " h: {use: to_host}, s: {use: int8}, p: {use: put, tier: hot}}}"
        ),
        "5:91", "graphs.store.stages.s",
        "int8 works on tokens and heads, which `order: native` does not know",
        "order: canonical, or auto",
    ),
    "a lossy codec behind another": (
        HEAD + "  store: {stages: {k: {use: hash}, l: {use: lookup}, g: {use: gather},"
        " h: {use: to_host}, z: {use: zstd}, s: {use: int8}, p: {use: put, tier: hot}}}",
        "4:107", "graphs.store.stages.s",
        "z gives bytes@host/frame but int8 takes kv@host/frame (kind differs)",
        "put 'decode' between them",
    ),
    "encoded bytes placed": (
        HEAD + "  retrieve: {stages: {k: {use: hash}, p: {use: lookup}, f: {use: get},"
        " s: {use: scatter}}}",
        "4:72", "graphs.retrieve.stages.s",
        "f gives bytes@host/frame but scatter takes kv@any/frame (kind differs)",
        "put 'decode' between them",
    ),
    "an anchor that contains itself": (
        "version: 1\nchunk: &a {tokens: *a}", "2:8", "chunk.tokens",
        "an anchor contains itself", "",
    ),
    "an unknown base": (
        "version: 1\nextends: teired", "2:10", "", "no preset is called 'teired'",
        "did you mean 'tiered'?; a file is named with its folder or ending, as in ./teired",
    ),
    "a base that is not there": (
        "version: 1\nextends: ./b.yaml", "2:10", "",
        "cannot read b.yaml: No such file or directory", "",
    ),
    "a base that is itself": (
        "version: 1\nextends: ./p.yaml", "2:10", "extends",
        "goes in a circle: p.yaml -> p.yaml", "",
    ),
    "a base that is no word": (
        "version: 1\nextends: [a]", "2:10", "extends", "wants a preset's name or a path",
        f"known: {', '.join(presets())}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES.values(), ids=FILES.keys())
def test_a_problem_of_a_file(checker, case) -> None:
    text, place, path, message, hint = case
    problems = checker.problems(text)
    assert (f"p.yaml:{place}", path, message, hint) in {
        (f"{p.file}:{p.line}:{p.col}", p.path, p.message, p.hint) for p in problems
    }, "\n".join(map(str, problems))


def test_a_problem_prints_its_line_and_its_cure(checker) -> None:
    (problem,) = [p for p in checker.problems("version: 1\nteirs: {}") if p.line == 2]
    assert (
        str(problem)
        == dedent("""
        p.yaml:2:1: unknown key 'teirs'
            teirs: {}
            hint: did you mean 'tiers'?""").strip()
    )


def test_all_problems_are_told_at_once_and_in_reading_order(checker) -> None:
    text = """
        version: 3
        chunk: {tokens: many}
        tiers:
          hot: {use: memory}
          cold: {use: rediss}
        graphs:
          store:
            deadline: soon
            stages:
              keys: {use: hash, seed: 1}
              pack: {use: gather}
              hot:  {use: put, tier: hto}
    """
    with pytest.raises(ConfigProblems) as caught:
        load_config(checker.write(text))
    assert [(p.line, p.col) for p in caught.value.problems] == [
        (1, 10), (2, 17), (4, 3), (5, 15), (8, 15), (10, 25), (11, 7), (12, 30),
    ]  # fmt: skip
    assert str(caught.value).count("p.yaml:") == 8


def test_memory_tiers_must_fit_into_memory(checker, monkeypatch) -> None:
    monkeypatch.setattr(check, "memory_here", lambda: 8 << 30)
    text = "version: 1\ntiers: {a: {use: 'standins:ArenaBox', capacity: 16 GiB}}"
    (problem, *_) = [p for p in checker.problems(text) if p.line == 2]
    assert (problem.col, problem.path) == (49, "tiers.a")
    assert problem.message == "tiers take 16 GiB of a memory of 8 GiB"
    assert problem.hint == "at most half of it is a good start: capacity: 4 GiB"


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigProblems, match=r"^nowhere.yaml: cannot read nowhere.yaml: No"):
        load_config("nowhere.yaml")


def test_a_preset_that_is_not_there() -> None:
    with pytest.raises(ConfigProblems, match=r"teired: no preset is called 'teired'"):
        load_config("teired")


KEYS = [
    "version", "extends", "tiers", "graphs", "store", "retrieve", "stages", "use", "from", "tier",
    "hash", "lookup", "gather", "put", "hot", "memory", "capacity", "chunk", "tokens", "minimal",
    "./p.yaml", "${A:-b}", "${", "os:getcwd", ":", "", "~", "a\0.b",
]  # fmt: skip
WORDS = st.sampled_from(KEYS)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=4)
TREES = st.recursive(
    SCALARS | st.binary(max_size=2),
    lambda t: st.lists(t, max_size=3) | st.dictionaries(WORDS | st.integers(), t, max_size=4),
    max_leaves=20,
)

OVERRIDES = st.dictionaries(st.text(max_size=9) | WORDS, TREES, max_size=2)


@settings(deadline=None, max_examples=300)
@given(mapping=st.dictionaries(WORDS, TREES, max_size=6), overrides=OVERRIDES)
def test_nothing_but_config_errors(mapping, overrides) -> None:
    with pytest.raises(ConfigError):
        load_config({**mapping, "graphs": {"store": mapping}}, overrides)


@settings(deadline=None, max_examples=200)
@given(st.text("aversion: 1[]{}#&*!|>-?'\"\n\t,%@$~\0é", max_size=60))
def test_nothing_but_config_errors_from_text(tmp_path_factory, text) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(text, newline="")
    with pytest.raises(ConfigError):
        load_config(file)
