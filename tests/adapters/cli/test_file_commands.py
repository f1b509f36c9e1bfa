"""Commands as programs use them: JSON, files that cannot be written, a terminal without UTF-8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tierloom.adapters.cli.commands import app
from tierloom.pipeline.config.load import load_config
from tierloom.stages.errors import ConfigError

LMCACHE = str(Path(__file__).parent.parent / "lmcache" / "cpu.yaml")


def run(*words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    done = CliRunner().invoke(app, words)
    if isinstance(done.exception, ConfigError):  # as `main` tells it
        return 2, done.stdout, str(done.exception)
    return done.exit_code, done.stdout, done.stderr


def test_check_as_json(tmp_path: Path) -> None:
    code, out, _ = run("check", "tiered", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["ok"] is True
    assert (told["tiers"], told["graphs"]) == (["hot", "warm"], ["store", "retrieve"])
    file = tmp_path / "p.yaml"
    file.write_text("version: 2\nteirs: {}\n")
    code, out, _ = run("check", str(file), "--json")
    assert code == 2
    told = json.loads(out)
    assert told["ok"] is False
    found = [p for p in told["problems"] if p["line"] == 2]
    assert (found[0]["message"], found[0]["hint"]) == (
        "unknown key 'teirs'",
        "did you mean 'tiers'?",
    )


def test_explain_as_json_is_a_file_that_says_the_same(tmp_path: Path) -> None:
    code, out, _ = run("explain", "cachegen", "--json")
    assert code == 0
    whole = json.loads(out)
    whole.pop("source")
    graphs, wanted = load_config(whole).graphs, load_config("cachegen").graphs
    assert [[n.options for n in g.nodes] for g in graphs.values()] == [
        [n.options for n in g.nodes] for g in wanted.values()
    ]


def test_explain_as_json_shows_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("version: 1\nextends: redis\ntiers: {cold: redis://me:hush@host:1/0}\n")
    out = run("explain", str(file), "--json")[1]
    assert "hush" not in out
    assert json.loads(out)["tiers"]["cold"]["url"] == "redis://***@host:1/0"


def test_doctor_as_json_and_with_nothing_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TIERLOOM_DIR", "/tmp/" + "long" * 30)
    code, out, _ = run("doctor", "--json")
    assert code == 0
    found = {each["name"]: each for each in json.loads(out)}
    assert {each["state"] for each in found.values()} <= {"ok", "warn", "absent"}
    assert found["cores"]["text"].endswith("usable")
    lines = run("doctor")[1].splitlines()
    assert len(lines) == len(found)
    assert not [line for line in lines if "…" in line]


def test_a_terminal_that_knows_only_ascii(tmp_path: Path) -> None:
    """And a folder whose name has more."""
    folder = tmp_path / "gr\u00f6\u00dfe"
    folder.mkdir()
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    plain |= {"PYTHONIOENCODING": "ascii:strict", "TIERLOOM_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "tierloom", "doctor"],
        env=os.environ | plain, capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"/gr???" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("quality", "--codec", "int4", "--json"), ("demo", "--json"),
        ("import-lmcache", LMCACHE, "--out"), ("schema", "--write"),
    ],
)  # fmt: skip
def test_a_path_that_cannot_be_written_is_refused_before_the_work(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "no" / "x", "No such file")):
        code, _, err = run(*words, str(path))
        assert code == 2
        assert reason in err
    assert not list(tmp_path.iterdir())


def test_an_imported_file_is_replaced_only_by_force(tmp_path: Path) -> None:
    out = tmp_path / "x.yaml"
    assert run("import-lmcache", LMCACHE, "--out", str(out))[0] == 0
    text = out.read_text()
    out.write_text("mine")
    assert run("import-lmcache", LMCACHE, "--out", str(out))[0] == 2
    assert out.read_text() == "mine"
    assert run("import-lmcache", LMCACHE, "--out", str(out), "--force")[0] == 0
    assert out.read_text() == text
    assert "version: 1" in run("import-lmcache", LMCACHE, "--out", "-")[1]


def test_completion_is_offered() -> None:
    assert "--install-completion" in run("--help")[1]
