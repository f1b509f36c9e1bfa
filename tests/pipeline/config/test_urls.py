"""Tiers written as URLs: what they become, where their problems point, and that no secret shows."""

from __future__ import annotations

import pytest

from tierloom.pipeline.config.explain import explain
from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.config.problems import ConfigProblems
from tierloom.stages import catalog

TEXT = """
version: 1
tiers:
  {0}
graphs:
  store:
    stages:
      keys: {{use: hash}}
      plan: {{use: lookup, want: absent}}
      pack: {{use: gather}}
      host: {{use: to_host}}
      cold: {{use: put, tier: cold}}
"""
"""The case stands in line 3, from column 3 on."""

REMOTE = sorted(set(catalog.SCHEMES.values()) - {"files"})


@pytest.fixture(autouse=True)
def _remotes(monkeypatch) -> None:
    """Each remote tier as a stand-in, whether or not there is a real one."""
    for name in REMOTE:
        monkeypatch.setitem(catalog.TIERS, name, "standins:Remote")


def options(checker, line: str, overrides: dict[str, object] | None = None):
    tier = load_config(checker.write(TEXT.format(line)), overrides).tiers["cold"]
    return tier.use, tier.options


@pytest.mark.parametrize(
    ("scheme", "tier"), [(s, t) for s, t in catalog.SCHEMES.items() if t != "files"]
)
def test_a_url_is_a_tier_and_its_url(checker, scheme, tier) -> None:
    url = f"{scheme}://host:6379/0?a=b"
    use, found = options(checker, f"cold: {url}")
    assert (use, found.url) == (tier, url)


def test_a_url_in_use_has_other_options_beside_it(checker) -> None:
    use, found = options(checker, 'cold: {use: "REDIS://host:1", ttl: 24 h, timeout: 20 ms}')
    assert (use, found.url, found.ttl) == ("redis", "REDIS://host:1", 86400.0)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///mnt/kv", "/mnt/kv"), ("fs:///mnt/kv", "/mnt/kv"), ("file://~/kv", "~/kv"),
        ("file://localhost/mnt/a%20b", "/mnt/a b"),
    ],
)  # fmt: skip
def test_a_file_url_is_a_folder(checker, url, path) -> None:
    use, found = options(checker, f"cold: {url}")
    assert (use, found.path) == ("files", path)


def test_variables_and_overrides(checker, monkeypatch) -> None:
    monkeypatch.setenv("COLD", "redis://there")
    assert options(checker, "cold: ${COLD:-redis://here}")[1].url == "redis://there"
    use, found = options(checker, "cold: redis://here", {"tiers.cold": "s3://bucket"})
    assert (use, found.url) == ("s3", "s3://bucket")
    found = options(checker, "cold: {use: 'redis://a', ttl: 1 s}", {"tiers.cold.use": "redis://b"})
    assert (found[1].url, found[1].ttl) == ("redis://b", 1.0)
    assert options(checker, "cold: redis://a", {"tiers.cold.url": "redis://c"})[1].url[-1] == "c"


def test_what_one_file_writes_as_a_url_another_extends(checker) -> None:
    checker.write(TEXT.format("cold: redis://host"), "base.yaml")
    for line, url, ttl in (
        ("cold: {ttl: 24 h}", "redis://host", 86400.0),
        ("cold: redis://other", "redis://other", 0.0),
        ("cold: {use: 'rediss://other', ttl: 1 h}", "rediss://other", 3600.0),
    ):
        checker.write(f"version: 1\nextends: ./base.yaml\ntiers: {{{line}}}")
        tier = load_config("./p.yaml").tiers["cold"]
        assert (tier.use, tier.options.url, tier.options.ttl) == ("redis", url, ttl)
    checker.write("version: 1\nextends: ./base.yaml\ntiers: {cold: 's3://bucket'}")
    assert load_config("./p.yaml").tiers["cold"].use == "s3"


PROBLEMS = {
    "an unknown scheme": (
        "cold: rediss3://host", "3:9", "tiers.cold",
        "no tier has URLs that begin with rediss3://", "did you mean 'rediss'?",
    ),
    "an unknown scheme in use": (
        "cold: {use: 'mooncakstore://host'}", "3:15", "tiers.cold",
        "no tier has URLs that begin with mooncakstore://", "did you mean 'mooncakestore'?",
    ),
    "LMCache's server": (
        "cold: lm://host:65432", "3:9", "tiers.cold",
        "lm:// is the protocol of LMCache's own server, which tierloom does not speak",
        "run `tierloom serve` there instead, and write tierloom://host:65432",
    ),
    "an option that the tier has not": (
        "cold: {use: 's3://bucket', tll: 1 s}", "3:30", "tiers.cold",
        "unknown key 'tll'", "did you mean 'ttl'?",
    ),
    "two URLs": (
        "cold: {use: 's3://bucket', url: 's3://other'}", "3:30", "tiers.cold",
        "'url' is in `use` already", "write `use: s3`, or leave `url` out",
    ),
    "a word": (
        "cold: redis", "3:3", "tiers.cold", "wants a mapping, got 'redis'",
        "a tier is {use: ...}, or a URL",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_a_problem_points_at_the_url(checker, case) -> None:
    line, place, path, message, hint = case
    (problem,) = checker.problems(TEXT.format(line))
    assert f"{problem.line}:{problem.col}" == place
    assert (problem.path, problem.message, problem.hint) == (path, message, hint)


def test_a_tier_that_is_not_installed_names_its_extra(checker, monkeypatch) -> None:
    monkeypatch.delitem(catalog.TIERS, "mooncake")
    (problem,) = checker.problems(TEXT.format("cold: mooncakestore://host:1"))
    assert (problem.line, problem.col) == (3, 9)
    assert problem.message == "no tier is called 'mooncake'"
    assert problem.hint == "it comes with an extra: pip install 'tierloom[mooncake]'"


SECRETS = [
    "cold: redis://user:hunter2@host:6379/0",
    "cold: redis://:hunter2@host",
    "cold: 'redis://user:hunter2@@ho@st'",
    "cold: 's3://bucket?region=x&secret_key=hunter2'",
    "cold: {use: redis, url: 'redis://host', password: hunter2}",
    "cold: {use: s3, url: 's3://b', params: {access_key: hunter2, secret_key: 'hunter2'}}",
]


@pytest.mark.parametrize("line", SECRETS)
def test_secrets_are_not_printed(checker, line) -> None:
    spec = load_config(checker.write(TEXT.format(line)))
    assert "hunter2" in str(spec.tiers["cold"].options)
    assert "hunter2" not in (told := explain(spec))
    assert "***" in told
    for bad in (line.replace("cold:", "cold: [") + "]", line.replace("://", "x://")):
        with pytest.raises(ConfigProblems) as caught:
            load_config(checker.write(TEXT.format(bad)), {"tiers.cold.ttl": "soon"})
        assert "hunter2" not in str(caught.value)


def test_a_secret_that_is_cut_short_is_none(checker) -> None:
    long = "hunter2" * 12
    text = TEXT.replace("version: 1", f"version: 1\nbudget: redis://user:{long}@host")
    (problem,) = checker.problems(text.format("cold: redis://host"))
    assert problem.message == "wants a mapping, got 'redis://***@host'"


def test_what_is_no_secret_is_printed(checker) -> None:
    text = TEXT.replace("version: 1", "version: 1\nchunk: {{tokens: 512}}")
    told = explain(load_config(checker.write(text.format("cold: redis://host:6379/0?protocol=3"))))
    assert "tokens 512" in told
    assert "cold: redis url redis://host:6379/0?protocol=3" in told
    told = explain(
        load_config(checker.write(TEXT.format("cold: {use: s3, url: x, password_env: KV}")))
    )
    assert "password_env KV" in told
