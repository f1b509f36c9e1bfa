"""Commands as programs use them: JSON, files that cannot be written, a terminal without UTF-8."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import tierloom
from tierloom.adapters.cli.commands import app
from tierloom.pipeline.config.load import load_config
from tierloom.stages.errors import ConfigError

DISK = {"tiers.warm.path": "${TIERLOOM_DIR}", "tiers.warm.segment": "16 MiB"}
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


def test_figures_go_to_stdout_and_all_else_to_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    def judged(*_: object, **__: object) -> dict[str, object]:
        return {"kl": 1.5}

    report = "tierloom.adapters.quality.report"
    monkeypatch.setattr(f"{report}.judge", judged)
    monkeypatch.setattr(f"{report}.screen", lambda report: "a table")
    for name in ("measure.references", "subject.load_subject"):
        monkeypatch.setattr(f"tierloom.adapters.quality.{name}", lambda *_: None)
    code, out, err = run("quality", "--codec", "int4", "--json", "-")
    assert (code, json.loads(out)) == (0, {"kl": 1.5})
    assert "a table" in err


def test_inspect_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERLOOM_DIR", str(tmp_path / "disk"))
    with tierloom.play("tiered", (4, 2, 64), tokens=256, overrides=DISK) as pipe:
        pipe.store().wait()
    folder = str(tmp_path / "disk")
    code, out, _ = run("inspect", folder, "--json")
    assert code == 0
    ((kept,),) = (json.loads(out)["kept"],)
    code, out, _ = run("inspect", f"{folder}@{kept['key'][:12]}", "--json")
    said = json.loads(out)
    assert (code, said["state"], said["bytes"]) == (0, "whole", kept["bytes"])
    assert said["header"]["key"] == kept["key"]
    assert [f["codecs"] for f in said["frames"]] == [["none"]]
    assert kept["key"] in run("inspect", f"{folder}@{kept['key']}")[1]
    code, out, err = run("inspect", f"{folder}@ffff", "--json")
    assert (code, err) == (2, "")
    assert json.loads(out)["state"] == "no object"


def test_disks_and_memory_that_are_not_there_are_told(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(
        "version: 1\nextends: tiered\nbudget: {arena: 900 TiB}\n"
        f"tiers: {{warm: {{path: '{tmp_path}/a', capacity: 800 TiB}}}}\n"
    )
    code, out, err = run("check", str(tmp_path / "p.yaml"))
    assert (code, "ok" in out) == (0, True)
    assert "budget.arena: requests and tiers take 900 TiB of a memory of" in err
    assert f"p.yaml:4:9: tiers.warm: {tmp_path}/a: tiers there may take 800 TiB more, and" in err
    told = json.loads(run("check", str(tmp_path / "p.yaml"), "--json")[1])
    assert [w["path"] for w in told["warnings"]] == ["budget.arena", "tiers.warm"]


def test_what_is_kept_already_needs_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "segment").write_bytes(bytes(8 << 20))
    file = tmp_path / "p.yaml"

    def told(folder: str) -> str:
        file.write_text(
            "version: 1\nextends: tiered\n"
            f"tiers: {{warm: {{path: '{tmp_path}/{folder}', capacity: 1028 MiB}}}}\n"
        )
        return run("check", str(file))[2]

    assert "tiers.warm" not in told("kept")
    assert "may take 1 GiB more, and 1 GiB are free" in told("empty")


@pytest.mark.parametrize("form", [[], ["-m", "tierloom"]])
def test_no_command_breaks_where_the_terminal_knows_only_ascii(
    form: list[str], tmp_path: Path
) -> None:
    """In one process for all commands, each with a file whose name has more."""
    (tmp_path / "gr\u00f6\u00dfe.yaml").write_text("version: 1\nteirs: {\u00e4: 1}\n", "utf-8")
    (tmp_path / "\u00e4.yaml").write_text("chunk_size: 'gro\u00df'\nlocal_cpu: true\n", "utf-8")
    code = f"""
import os, sys
os.chdir({str(tmp_path)!r})
from tierloom.adapters.cli import main
bad, lm = sorted(n for n in os.listdir(".") if n.endswith("yaml"))
for words in (["check", bad], ["explain", bad], ["check", lm], ["import-lmcache", lm],
              ["import-lmcache", lm, "--out", "o.yaml"], ["inspect", bad],
              ["inspect", lm, "--json"], ["--help"], ["deploy"],
              ["explain", "cachegen"],
              ["serve", "--config", bad], ["warm", bad, "--url", "http://127.0.0.1:1"]):
    sys.argv = ["tierloom", *words]
    try:
        main()
    except SystemExit as end:
        print("ended", words[0], end.code, flush=True)
"""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [*form, "--version"] if form else ["-c", code]
    done = subprocess.run(
        [sys.executable, *words], env=os.environ | plain, capture_output=True, text=True,
        timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert form or sum(s.startswith("ended ") for s in done.stdout.splitlines()) == 12


def test_nothing_is_cut_where_it_goes_to_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    group: Any = typer.main.get_command(app)
    commands = [[name] for name in group.commands]
    for name, command in group.commands.items():
        commands += [[name, inner] for inner in getattr(command, "commands", ())]
    for words in (["doctor"], *([*words, "--help"] for words in commands)):
        assert "\u2026" not in run(*words)[1], words


def test_completion_is_offered() -> None:
    assert "--install-completion" in run("--help")[1]
