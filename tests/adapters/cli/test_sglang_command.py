"""`tierloom sglang`: flags that survive a shell, and what is refused before SGLang starts."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tierloom.adapters.cli import commands as cli, sglang_check, sglang_launch
from tierloom.adapters.sglang.settings import hicache_config, linker_config


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """`run("--linker")` gives exit code, stdout and stderr; runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TIERLOOM_CONFIG", raising=False)
    monkeypatch.setenv("TIERLOOM_MEMORY", "64 MiB")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tierloom", "sglang", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def flags(printed: str) -> dict[str, str]:
    """What a shell makes of a printed line: flags, and the value of each."""
    words = shlex.split(printed)
    pairs = [*zip(words, [*words[1:], ""], strict=True)]
    return {
        word: "" if value.startswith("--") else value for word, value in pairs if word[:2] == "--"
    }


def test_flags_of_hicache(run) -> None:
    code, out, err = run("--set", "tiers.hot.capacity=32 MiB", "--set", "tierloom.min_tokens=512")
    assert (code, err, out.count("\n")) == (0, "", 1)
    said = flags(out)
    extra = json.loads(said.pop("--hicache-storage-backend-extra-config"))
    assert said == {
        "--page-size": "32", "--enable-hierarchical-cache": "",
        "--hicache-storage-backend": "dynamic",
    }  # fmt: skip
    assert extra == {
        "backend_name": "tierloom", "module_path": "tierloom.adapters.sglang.hicache",
        "class_name": "TierloomHiCache", "interface_v1": 1,
        "hicache_storage_pass_prefix_keys": True, "tierloom.config": "tiered",
        "tiers.hot.capacity": "32 MiB", "tierloom.min_tokens": 512,
    }  # fmt: skip
    del extra["hicache_storage_pass_prefix_keys"]  # SGLang takes it out
    assert hicache_config(extra).settings.min_tokens == 512


def test_flags_of_the_linker(run) -> None:
    code, out, err = run("--linker", "--page-size", "64", "--config", "minimal")
    assert (code, err) == (0, "")
    said = flags(out)
    config = json.loads(said.pop("--unified-cache-external-linker-config"))
    assert said == {
        "--page-size": "64", "--enable-unified-cache-external-linker": "",
        "--unified-cache-external-linker-backend": "dynamic",
    }  # fmt: skip
    assert config == {
        "linker": "TierloomLinker", "linker_module_path": "tierloom.adapters.sglang.linker",
        "linker_extra_config": {"tierloom.config": "minimal"},
    }  # fmt: skip
    assert linker_config(config["linker_extra_config"]).source == "minimal"


@pytest.mark.parametrize("value", ["it's", 'a "b"', "$HOME `ls` \\", "ü; rm", "a\nb"])
def test_values_survive_a_shell(run, value) -> None:
    _, out, _ = run("--set", f"tierloom.name={value}")
    shell = "import sys; print(sys.argv[-1])"
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -c {shlex.quote(shell)} {out}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["tierloom.name"] == value


def test_a_file_is_found_from_anywhere(run, tmp_path) -> None:
    Path("mine.yaml").write_text("version: 1\nextends: minimal\n")
    for words in (("--config", "mine.yaml"), ("--config", "./mine.yaml")):
        extra = json.loads(shlex.split(run(*words)[1])[-1])
        assert extra["tierloom.config"] == str(tmp_path / "mine.yaml")


def test_the_variable_of_the_presets_user(run, monkeypatch) -> None:
    monkeypatch.setenv("TIERLOOM_CONFIG", "minimal")
    assert '"tierloom.config": "minimal"' in run()[1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--page-size", "1"], "--page-size 32"),
        (["--page-size", "1", "--linker"], "--page-size 32"),
        (["--page-size", "48"], "does not divide chunk.tokens 256: set chunk.tokens to 240"),
        (["--config", "teired"], "teired"),
        (["--set", "tiers.hot.capcity=1"], "did you mean 'capacity'"),
        (["--set", "tierloom.wiat=1"], "did you mean 'wait'"),
        (["--set", "tierloom.wait=250"], "has no unit"),
        (["--set", "capacity"], "write KEY=VALUE"),
        (["--set", "=1"], "write KEY=VALUE"),
        (["--set", "interface_v1=0"], '"interface_v1": 1'),
        (["--linker", "--set", "interface_v1=1"], "interface_v1"),
        (["--", "--model-path", "m"], "with --exec alone"),
    ],
)
def test_what_is_refused_at_once(run, words, says) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert says in err
    assert "Traceback" not in err


def test_what_sglang_reads_itself_is_not_refused(run) -> None:
    code, out, _ = run("--set", "prefetch_threshold=32", "--set", "prefetch_timeout_base=2")
    assert (code, '"prefetch_threshold": 32' in out) == (0, True)


def test_exec_becomes_sglang(run, monkeypatch) -> None:
    became: list[Any] = []

    def execv(path: str, command: list[str]) -> None:
        became.append((path, command))
        raise SystemExit(7)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: types.ModuleType(name))
    monkeypatch.setattr("os.execv", execv)
    theirs = ["--model-path", "m n", "--page-size", "128"]
    assert run("--exec", "--page-size", "64", "--", *theirs)[0] == 7
    ((path, command),) = became
    assert path == command[0] == sys.executable
    assert command[1:5] == ["-m", "sglang.launch_server", "--page-size", "64"]
    assert command[-4:] == theirs


def test_exec_without_sglang(run, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run("--exec", "--", "--model-path", "m")
    assert (code, "not installed" in err) == (2, True)


@pytest.fixture
def installed(monkeypatch) -> dict[str, Any]:
    """An SGLang whose adapter loads; what of it a test may change."""
    backend = types.SimpleNamespace(__abstractmethods__=set(), __module__="m", __name__="C")
    adapter = types.SimpleNamespace(
        TierloomHiCache=backend, TierloomLinker=backend, UNKNOWN=set(), __name__="m"
    )
    there: dict[str, Any] = {"version": sglang_launch.TESTED, "adapter": adapter}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: types.ModuleType(name))
    monkeypatch.setattr("importlib.metadata.version", lambda name: there["version"])
    monkeypatch.setattr(sglang_check, "_loaded", lambda name: there["adapter"])
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    return there


@pytest.mark.parametrize("linker", [[], ["--linker"]])
def test_check_finds_nothing(run, installed, linker) -> None:
    code, out, err = run("--check", *linker)
    assert (code, err) == (0, "")
    assert "refused" not in out
    assert "settings: tiered, pages of 32 tokens" in out
    assert f"SGLang: {sglang_launch.TESTED}" in out


def test_check_says_all_that_would_be_refused(run, installed, monkeypatch) -> None:
    installed["adapter"].TierloomHiCache.__abstractmethods__ = {"batch_pin", "batch_fly"}
    installed["adapter"].UNKNOWN = {"pause"}
    installed["version"] = "0.6.0"
    monkeypatch.setattr("shutil.which", lambda name: None)
    code, out, _ = run("--check", "--page-size", "1")
    assert code == 1
    assert out.count("refused  ") == 3
    assert "--page-size 32" in out
    assert "apt-get install g++ ninja-build" in out
    assert "HiCacheStorage wants methods that ours lacks: batch_fly, batch_pin" in out
    assert "0.6.0 is not the version that was tested" in out
    code, out, _ = run("--check", "--linker")
    assert (code, "UnifiedCacheLinker wants methods that ours lacks: pause" in out) == (1, True)


def test_check_without_sglang(run, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "sglang", None)
    monkeypatch.delitem(sys.modules, "tierloom.adapters.sglang.hicache", raising=False)
    code, out, _ = run("--check", "--config", "teired")
    assert code == 1
    assert "refused  settings: " in out
    assert f"pip install sglang=={sglang_launch.TESTED}" in out
    assert "refused  adapter: cannot be loaded" in out
    assert "note" not in out


def test_the_command_is_light() -> None:
    """Flags are printed by a process that imports neither an engine nor torch."""
    code = (
        "import sys; from tierloom.adapters.cli.sglang_launch import run_sglang; "
        "run_sglang('tiered', [], 32, [], linker=False, execute=False, check=False); "
        "assert not {'torch', 'sglang', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
