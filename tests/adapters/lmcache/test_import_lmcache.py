"""tierloom import-lmcache: the configurations of LMCache's guide, converted and checked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tierloom.adapters.cli.commands import app
from tierloom.adapters.lmcache.options import CONVERTED, REASONS
from tierloom.adapters.sglang.settings import chunked, hicache_config, linker_config
from tierloom.pipeline.config import load as check
from tierloom.pipeline.config.problems import ConfigProblems
from tierloom.stages import catalog
from tierloom.stages.errors import ConfigError

FILES = sorted((Path(__file__).parent).glob("*.yaml"))
NAMES = [file.stem for file in FILES]


@pytest.fixture(autouse=True)
def _room(monkeypatch) -> None:
    """Memory enough for any of them, and no variables of this machine's."""
    monkeypatch.setattr(check, "memory_here", lambda: 1 << 40)
    for name in [n for n in os.environ if n.startswith(("LMCACHE_", "REDIS_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def run(tmp_path):
    def convert(*words: str):
        out = tmp_path / "out.yaml"
        words = (*words, "--out", str(out), "--force")
        done = CliRunner().invoke(app, ["import-lmcache", *words])
        not_done = "tierloom: " in done.stderr
        assert done.exit_code == int(not_done), done.output
        return out, done.stderr

    return convert


@pytest.fixture
def converted(run):
    """A sample converted: the text, the YAML of it, what stderr says."""

    def convert(name: str):
        out, told = run(str(Path(__file__).parent / f"{name}.yaml"))
        return out.read_text(), yaml.safe_load(out.read_text()), told

    return convert


def tiers_used(tree: dict) -> set[str]:
    return {entry["use"] for entry in tree["tiers"].values()}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_made_passes_the_check(run, converted, name) -> None:
    """A tier that is not registered is the only thing that may be wrong."""
    _, tree, _ = converted(name)
    missing = sorted(tiers_used(tree) - catalog.TIERS.keys())
    out, _ = run(str(Path(__file__).parent / f"{name}.yaml"))
    if not missing:
        spec = check.load_config(out)
        assert not check.warnings(spec) or name in ("locations",)
        return
    with pytest.raises(ConfigProblems) as caught:
        check.load_config(out)
    assert {p.message for p in caught.value.problems} == {
        f"no tier is called {tier!r}" for tier in missing
    }
    pytest.skip(f"tier {', '.join(missing)} is not registered")


@pytest.mark.parametrize("name", ["cpu", "redis", "server", "s3"])
def test_what_is_made_opens_for_sglang(run, name) -> None:
    """Named by `tierloom.config`, as for vLLM; the grain is then SGLang's page."""
    out, _ = run(str(Path(__file__).parent / f"{name}.yaml"))
    extra = {"tierloom.config": str(out)}
    hicache, linker = hicache_config({"interface_v1": 1, **extra}), linker_config(extra)
    for spec in (
        hicache.pipeline(chunked(hicache, 32)),
        linker.pipeline(chunked(linker, 32, chunk=32)),
    ):
        assert spec.tiers.keys() == check.load_config(out).tiers.keys()
        assert (spec.chunk.grain, spec.chunk.keys) == (32, "sglang")


def test_chunks_that_sglangs_page_does_not_divide_are_told(run) -> None:
    out, _ = run(str(Path(__file__).parent / "disk.yaml"))
    extra = {"interface_v1": 1, "tierloom.config": str(out)}
    with pytest.raises(ConfigError, match=r"chunk.tokens 48: set chunk.tokens to 32"):
        chunked(hicache_config(extra), 32)
    said = hicache_config({**extra, "chunk.tokens": 32})
    assert said.pipeline(chunked(said, 32)).chunk.tokens == 32


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_converted_or_told_of(converted, name) -> None:
    text, _, _ = converted(name)
    given = yaml.safe_load((Path(__file__).parent / f"{name}.yaml").read_text())
    old = {"controller_url": "controller_pull_url", "lmcache_worker_port": "lmcache_worker_ports",
           "enable_xpyd": "enable_pd", "nixl_role": "pd_role"}  # fmt: skip
    for option in given:
        option = old.get(option, option)
        assert option in CONVERTED or f"# - {option}: " in text
    assert "hunter2" not in text


def test_sizes_chunks_and_policies(converted) -> None:
    _, cpu, told = converted("cpu")
    assert cpu["chunk"] == {"tokens": 128, "partial": True}
    assert cpu["tiers"] == {"hot": {"use": "memory", "capacity": "2560 MiB", "evict": "lfu"}}
    assert "tierloom check" in told
    _, disk, _ = converted("disk")
    assert disk["chunk"] == {"tokens": 48, "grain": 16}
    assert disk["budget"] == {"arena": "512 MiB"}
    assert disk["tiers"] == {
        "warm": {"use": "disk", "path": "/data/kv/", "capacity": "40 GiB", "evict": "fifo",
                 "direct": True}
    }  # fmt: skip


REMOTE = {
    "redis": {"use": "redis", "url": "redis://kv@cache.example:6379/2"},
    "redis_cluster": {"use": "redis", "url": "redis-cluster://one:7000,two:7001"},
    "sentinel": {
        "use": "redis",
        "url": "redis-sentinel://one:26379,two:26379,three:26379"
        "/${REDIS_SERVICE_NAME:-redismaster}",
    },
    "valkey": {"use": "redis", "url": "rediss-cluster://kv@one:6379,two:6379"},
    "server": {"use": "server", "url": "tierloom://store.example:65432"},
    "pd_decode": {"use": "server", "url": "tierloom://store.example:8888"},
    "mooncake": {"use": "mooncake", "url": "mooncakestore://127.0.0.1:50051"},
    "infinistore": {"use": "infinistore", "url": "infinistore://10.0.0.5:12345/?device=mlx5_1"},
    "s3": {"use": "s3", "url": "s3://kv/engines", "timeout": "60 s"},
    "s3_amazon": {"use": "s3", "url": "s3://kv"},
    "azure": {"use": "s3", "url": "az://kv"},
    "fs_url": {"use": "files", "path": "/mnt/kv"},
    "mock": {"use": "mock", "capacity": "100 GiB", "latency": "1 ms", "bandwidth": "2 GiB"},
    "audit": {"use": "audit", "of": {"use": "files", "path": "/mnt/kv"}},
}


@pytest.mark.parametrize("name", REMOTE)
def test_remote_stores(converted, name) -> None:
    _, tree, _ = converted(name)
    assert REMOTE[name].items() <= tree["tiers"]["cold"].items()


def test_options_that_a_tier_has_are_carried_over(converted, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "pipeline" / "config"))
    monkeypatch.setitem(catalog.TIERS, "redis", "standins:Remote")
    text, tree, _ = converted("valkey")
    assert tree["tiers"]["cold"]["ttl"] == "3600 s"
    assert "valkey_ttl_sec" not in text
    monkeypatch.delitem(catalog.TIERS, "redis")
    text, tree, _ = converted("valkey")
    assert "ttl" not in tree["tiers"]["cold"]
    assert "# valkey_ttl_sec: 3600 s (no option of the tier)" in text


def test_nixl(converted) -> None:
    _, tree, _ = converted("nixl_posix")
    made = tree["tiers"]["nixl"]
    assert {"use": "nixl", "backend": "POSIX", "path": "/mnt/nixl"}.items() <= made.items()
    text, tree, _ = converted("nixl_obj")
    made = tree["tiers"]["nixl"]
    assert {"use": "nixl", "backend": "OBJ", "url": "s3://kv"}.items() <= made.items()
    assert "secret_key is not copied" in text


def test_a_codec_stands_before_remote_tiers_only(converted) -> None:
    _, tree, _ = converted("server")
    stages = tree["graphs"]["store"]["stages"]
    assert stages["small"] == {"use": "cachegen", "from": "host", "level": "default"}
    assert (stages["put_hot"]["from"], stages["put_cold"]["from"]) == ("host", "small")
    text, tree, _ = converted("fs_url")
    assert "small" not in tree["graphs"]["store"]["stages"]
    assert "kivi is a stub" in text


def test_locations(converted) -> None:
    _, tree, told = converted("locations")
    store, retrieve = (tree["graphs"][g]["stages"] for g in ("store", "retrieve"))
    assert [n for n in store if n.startswith("put_")] == ["put_warm"]
    assert store["fresh"]["tiers"] == retrieve["plan"]["tiers"] == ["warm"]
    assert "P2PBackend has no counterpart" in told
    _, tree, _ = converted("fs")
    assert list(tree["tiers"]) == ["cold_fs_primary", "cold_fs_backup"]


def test_what_the_engine_is_told(converted) -> None:
    text, tree, _ = converted("redis")
    assert '"tierloom.save_decode": true, "tierloom.min_tokens": 512' in text
    assert '"tierloom.wait": "400 ms"' in text
    assert tree["graphs"]["retrieve"]["deadline"] == tree["tiers"]["cold"]["timeout"] == "3 s"
    assert '"tierloom.load": "layer", "tierloom.save": "layer"' in converted("gds")[0]


def test_blending(converted, run, tmp_path) -> None:
    text, tree, told = converted("blending")
    store, retrieve = (tree["graphs"][g]["stages"] for g in ("store", "retrieve"))
    assert store["fresh"]["by"] == "content"
    assert retrieve["plan"]["want"] == "anywhere"
    assert retrieve["mend"] == {"use": "blend", "share": "15 %", "ceiling": "15 %"}
    assert '"tierloom.save": "layer", "tierloom.blend": "on"' in text
    assert '"tierloom.load"' not in text
    assert "there is no stage" not in told
    given = tmp_path / "lmcache.yaml"
    given.write_text(
        "enable_blending: True\nblend_min_tokens: 512\nblend_recompute_ratios: [0.01]\n"
    )
    spec = check.load_config(run(str(given))[0])
    plan, mend = (spec.graphs["retrieve"].nodes[i].options for i in (1, 2))
    assert plan.least == 512
    assert mend.share == mend.ceiling == 0.01
    given.write_text("enable_blending: true\nblend_recompute_ratios: 15\nlocal_cpu: false\n"
                     "max_local_cpu_size: 0\nremote_url: redis://h:1\n")  # fmt: skip
    _, told = run(str(given))
    assert "no share of the tokens: 15" in told
    assert "blending finds text in local tiers, and there is none" in told


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("p2p", ["controller"]),
        ("controller", ["controller"]), ("fs", ["plug-in 'mine'"]),
        ("wrong", ["bigtable", "chunk_size: wants a number", "chunk_sise: no option of LMCache's"]),
    ],
)  # fmt: skip
def test_what_has_no_stage_is_named(converted, name, words) -> None:
    text, tree, told = converted(name)
    for word in words:
        assert word in told
        assert word.split(":")[0] in text
    assert tree["tiers"]


def test_nothing_is_said_of_what_is_not_asked_for(run, tmp_path) -> None:
    (tmp_path / "l.yaml").write_text("enable_p2p: false\nenable_pd: 'no'\n")
    assert "peer" not in run(str(tmp_path / "l.yaml"))[1]


def test_the_environment(run, monkeypatch, tmp_path) -> None:
    for name, value in {
        "CHUNK_SIZE": "64", "LOCAL_CPU": "False", "LOCAL_DISK": '"file:///data/kv"',
        "MAX_LOCAL_DISK_SIZE": "5.0", "EXTRA_CONFIG": "{'use_odirect': True}",
        "SAVE_DECODE_CACHE": "1", "ENABLE_P2P": "true", "P2P_INIT_PORTS": "1,2",
        "LOG_LEVEL": "DEBUG",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"LMCACHE_{name}", value)
    out, told = run()
    tree = yaml.safe_load(out.read_text())
    assert tree["tiers"]["warm"] == {
        "use": "disk", "path": "/data/kv", "capacity": "5 GiB", "direct": True
    }  # fmt: skip
    assert list(tree["tiers"]) == ["warm", "near"]
    assert tree["serve"]["listen"] == "localhost:0"
    assert tree["chunk"]["tokens"] == 64
    assert "peer" not in told
    check.load_config(out)
    (tmp_path / "l.yaml").write_text("chunk_size: 32\nmax_local_disk_size: 7\nlocal_disk: /x\n")
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(tmp_path / "l.yaml"))
    monkeypatch.delenv("LMCACHE_MAX_LOCAL_DISK_SIZE")
    tree = yaml.safe_load(run()[0].read_text())
    assert (tree["chunk"]["tokens"], tree["tiers"]["warm"]["capacity"]) == (64, "7 GiB")
    tree = yaml.safe_load(run(str(tmp_path / "l.yaml"))[0].read_text())
    assert tree["chunk"]["tokens"] == 32, "a file that is named is all there is"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no LMCACHE_* variable sets an option"), ("a: [", "not YAML"), ("- a", "a mapping"),
        ("!!python/object/apply:os.system [echo hi]", "not YAML"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(tmp_path, text, said) -> None:
    from tierloom.stages.errors import ConfigError

    words = ["import-lmcache"]
    if text is not None:
        (tmp_path / "l.yaml").write_text(text)
        words.append(str(tmp_path / "l.yaml"))
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, ConfigError)
    assert said in str(done.exception)


def test_nothing_in_a_file_gets_out_of_its_comment(run, tmp_path) -> None:
    (tmp_path / "l.yaml").write_text(
        'chunk_size: 64\n"x\\ny: 1": "a\\nb: 2"\nextra_config: {"k\\ntiers: null": 1}\n'
        'remote_url: "fs:///a\\n  b: c"\n'
    )
    spec = check.load_config(run(str(tmp_path / "l.yaml"))[0])
    assert spec.tiers["cold"].options.path == "/a\n  b: c"


def test_no_option_has_two_tables() -> None:
    assert not CONVERTED.keys() & REASONS.keys()
