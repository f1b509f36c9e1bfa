"""`tierloom bench`: figures of every tier, of what really came back, and nothing left over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import ask, redis

from tierloom.adapters.cli import commands as cli

SMALL = ("--kvcache_shape_spec", "(2,16,32,4,32):bfloat16:8", "--rounds", "4", "--warmup", "2")
LATENT = ("--kvcache-shape-spec", "(1,16,32,1,72):bfloat16:8", "--use_mla", *SMALL[2:])
Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def run(capsys, monkeypatch, tmp_path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TIERLOOM_DIR", str(tmp_path / "kv"))
    monkeypatch.setenv("TIERLOOM_MEMORY", "64 MiB")

    def run(*words: str) -> tuple[int, dict[str, Any], str]:
        monkeypatch.setattr("sys.argv", ["tierloom", "bench", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), json.loads(out) if out.startswith("{") else {}, err

    return run


@pytest.mark.parametrize("shape", [SMALL, LATENT])
def test_every_tier_both_ways(run, tmp_path, shape) -> None:
    code, said, err = run("--config", "tiered", *shape, "--json", "-")
    assert (code, said["ok"]) == (0, True), err
    rows = {(row["tier"], row["graph"]): row for row in said["rows"]}
    assert [*rows] == [(t, g) for t in ("hot", "warm") for g in ("store", "retrieve")]
    for row in rows.values():
        assert row["gb_per_s_least"] <= row["gb_per_s"] <= row["gb_per_s_most"]
        assert row["spread"] >= 0
        assert min(row["of_a_copy"], row["copy_gb_per_s"], row["cpu_s_per_gb"]) > 0
        assert row["bytes"] == (2 * 4 * 32 if shape is SMALL else 72) * 8 * 2 * 512
    assert not list((tmp_path / "kv").iterdir()), "the folder of the run goes with it"


def test_a_store_of_others_is_left_as_it_was(run, monkeypatch) -> None:
    with redis() as server:
        monkeypatch.setenv("TIERLOOM_REDIS", f"redis://127.0.0.1:{server.port}")
        ask(server.port, "SET", "theirs", "x")
        far = ("--set", "tiers.cold.timeout=30 s")
        code, said, err = run("--config", "redis", *SMALL, *far, "--json", "-")
        assert (code, len(said["rows"])) == (0, 4), err
        assert ask(server.port, "DBSIZE").strip() == ":1"


def test_what_did_not_come_back_has_no_figure(run, monkeypatch) -> None:
    monkeypatch.setenv("TIERLOOM_REDIS", "redis://127.0.0.1:1")
    code, said, err = run("--config", "redis", *SMALL, "--json", "-")
    assert code == 1
    assert {row["tier"] for row in said["rows"]} == {"hot"}
    assert "cold: store of prompt 0: 0 of 512 tokens (tier_down" in err


def test_other_bytes_have_no_figure(run, monkeypatch) -> None:
    monkeypatch.setattr(
        "tierloom.adapters.made_up.made_up_kv.MadeUpKV.blank",
        lambda kv: kv.caches[1].view(-1)[5].add_(1),  # and no retrieve brings it back
    )
    monkeypatch.setattr("tierloom.pipeline.pipeline.Pipeline.retrieve", _nothing)
    code, said, err = run("--config", "minimal", *SMALL, "--json", "-")
    assert (code, said["rows"]) == (1, [])
    assert "layer 1, K, token 0 (block 0, row 0), head 0, byte 1" in err


def _nothing(pipe: Any, ids: Any, *given: Any, **names: Any) -> Any:
    """A retrieve that says that it brought everything."""
    ticket = pipe.store(ids, *given, **names)
    made = ticket.wait()
    return type("Done", (), {"wait": lambda _: made})()


def test_pytest_has_a_command_of_its_own(run) -> None:
    assert run("-k", "copy")[0] == 2
    code, _, err = run("pytest", "-k", "copy")
    assert (code, "not a checkout of tierloom" in err) == (2, True)
    for folder in ("benchmarks", "pipeline"):
        Path(folder).mkdir()
    Path("benchmarks/test_x.py").write_text("def test_copy(): pass\ndef test_other(): assert 0\n")
    assert run("pytest", "-k", "other", "-q", "-p", "no:cacheprovider")[0] == 1
