"""`tierloom standalone`: there and back through real stores, and what it says when it fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from servers import ask, redis
from store_server import process as store_process

from tierloom.adapters.cli import commands as cli
from tierloom.adapters.made_up.kv_groups import kv_groups
from tierloom.adapters.made_up.made_up_kv import MadeUpKV

DOCUMENTED = "(2,2,256,4,16):float16:2"
LATENT = "(1,8,64,1,72):bfloat16:3"
ODD = "(2,5,48,3,24):float32:5"
SMALL = ("--kvcache-shape-spec", DOCUMENTED)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys, monkeypatch, tmp_path) -> Run:
    """Exit code, stdout and stderr of a command, in an empty folder, with little memory."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("MEMORY", "64 MiB"), ("DIR", str(tmp_path / "kv")), ("DISK", "128 MiB")):
        monkeypatch.setenv(f"TIERLOOM_{name}", value)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tierloom", "standalone", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a Redis."""
    with redis() as server:
        yield server.port


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[str]:
    """The address of a `tierloom serve`."""
    with store_process(tmp_path_factory.mktemp("served")) as server:
        yield server.url


def keys_in(port: int) -> int:
    return int(ask(port, "DBSIZE").strip().lstrip(":"))


@pytest.mark.parametrize(
    ("spec", "more"),
    [(DOCUMENTED, ()), (LATENT, ("--use_mla",)), (f"{ODD};{LATENT}", ())],
    ids=["documented", "mla", "two groups"],
)
@pytest.mark.parametrize("config", ["minimal", "tiered", "server", "redis"])
def test_every_byte_is_equal(run, monkeypatch, port, served, config, spec, more) -> None:
    monkeypatch.setenv("TIERLOOM_REDIS", f"redis://127.0.0.1:{port}")
    monkeypatch.setenv("TIERLOOM_SERVER", served)
    segment = ("--set", "tiers.warm.segment=64 MiB") if config == "tiered" else ()
    far = ("--set", "tiers.cold.timeout=30 s") if config in ("server", "redis") else ()
    words = ("--config", config, "--kvcache_shape_spec", spec, *more, *segment, *far)
    code, out, err = run(*words, "--once", "--json", "-")
    said = json.loads(out)
    assert (code, said["ok"], said["wrong"]) == (0, True, []), err
    assert [g["shape"] for g in said["groups"]] == spec.split(";")
    colder = {"tiered": ["warm"], "server": ["cold"], "redis": ["cold"]}.get(config, [])
    for group, asked in zip(said["groups"], kv_groups(spec), strict=True):
        assert [t["tier"] for t in group["tiers"]] == ["hot", *colder]
        assert {t["tokens"] for t in group["tiers"]} == {asked.tokens}
        assert {t["nbytes"] for t in group["tiers"]} == {asked.tokens * asked.token_bytes}
    if config == "redis":
        assert keys_in(port) == 0, "what others share is left as it was found"


def test_an_lmcache_file(run, port) -> None:
    Path("lmcache.yaml").write_text(
        f"chunk_size: 128\nlocal_cpu: true\nmax_local_cpu_size: 0.1\nenable_controller: true\n"
        f"remote_url: redis://127.0.0.1:{port}\n"
    )
    code, out, err = run(
        "--config", "lmcache.yaml", "--kvcache-shape-spec", DOCUMENTED, "--once", "--json", "-"
    )
    (group,) = json.loads(out)["groups"]
    assert code == 0, err
    assert [t["tier"] for t in group["tiers"]] == ["hot", "cold"]
    assert [t["chunks"] for t in group["tiers"]] == [group["tokens"] // 128] * 2
    assert "lmcache.yaml: not done: the controller" in err


def test_a_tier_that_is_down_is_named(run, monkeypatch) -> None:
    monkeypatch.setenv("TIERLOOM_REDIS", "redis://127.0.0.1:1")
    code, _, err = run("--config", "redis", *SMALL, "--once", "--json", "x.json")
    assert code == 1
    assert "cold took 0 of 2 chunks" in err
    assert json.loads(Path("x.json").read_text())["ok"] is False


def lossy() -> str:
    Path("int8.yaml").write_text(
        "version: 1\nextends: minimal\n"
        "graphs: {store: {stages: {small: {use: int8, from: host}, hot: {from: small}}}}\n"
    )
    return "./int8.yaml"


def test_codecs_with_loss_are_compared_as_numbers(run) -> None:
    code, out, err = run("--config", lossy(), *SMALL, "--once", "--json", "-")
    assert code == 0, err
    assert json.loads(out)["groups"][0]["lossy"] is True
    assert "as close as its codecs promise" in err


@pytest.mark.parametrize("how", [("--once",), ("--load", "50", "--http", "")])
def test_other_bytes_are_exit_1_with_the_place(run, monkeypatch, how) -> None:
    """What a codec with loss gives back, as if it had promised every byte."""
    monkeypatch.setattr("tierloom.adapters.made_up.round_trip.Lossy", type("Nothing", (), {}))
    code, _, err = run("--config", lossy(), "--kvcache-shape-spec", DOCUMENTED, *how)
    assert code == 1
    assert "layer 0, K, token 0 (block 0, row 0), head 0, byte" in err
    assert "was stored" in err


@pytest.mark.parametrize("spec", [DOCUMENTED, LATENT, ODD, "(2,2,8,2,16):float8_e4m3fn:2"])
def test_one_bit_is_found_where_it_is(spec) -> None:
    (group,) = kv_groups(spec)
    kv = MadeUpKV(group, seed=3)
    kv.fill(7)
    assert kv.difference(7, group.tokens) == ""
    assert kv.difference(8, group.tokens), "another prompt has other KV"
    rows = kv.caches[1].view(torch.uint8).view(group.kv, group.tokens, group.heads, -1)
    rows[-1, 10, -1, 5] ^= 16
    assert kv.difference(7, 10) == "", "it is no part of what came"
    block, row = divmod(10, group.block_tokens)
    plane = "V" if group.kv == 2 else "latent"
    where = f"layer 1, {plane}, token 10 (block {block}, row {row}), head {group.heads - 1}, byte 5"
    assert kv.difference(7, group.tokens).startswith(where)
    assert 0 < kv.error(7, group.tokens) < 1e9
    kv.blank()
    assert kv.error(7, group.tokens) == pytest.approx(1)


def test_a_service_with_a_load(tmp_path, port) -> None:
    """Health and metrics while it runs; a signal ends it, and nothing is left in Redis."""
    command = [
        sys.executable, "-m", "tierloom.adapters.cli", "standalone", "--config", "redis",
        "--kvcache-shape-spec", DOCUMENTED, "--load", "100", "--prompts", "3",
        "--json", str(tmp_path / "load.json"), "--set", "tiers.hot.capacity=8 MiB",
        "--set", f"tiers.cold.url=redis://127.0.0.1:{port}", "--set", "tiers.cold.timeout=30 s",
        "--set", "graphs.retrieve.deadline=30 s", "--set", "graphs.store.deadline=30 s",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as it:
        try:
            assert it.stdout is not None
            url = it.stdout.readline().split()[-1]
            end = time.monotonic() + 30
            while keys_in(port) == 0 and time.monotonic() < end:
                time.sleep(0.05)
            assert httpx.get(f"{url}/readyz", trust_env=False).json()["status"] == "ready"
            time.sleep(0.5)
            assert "tierloom_tier_hits_total" in httpx.get(f"{url}/metrics", trust_env=False).text
            it.send_signal(signal.SIGTERM)
            _, err = it.communicate(timeout=30)
        finally:
            it.kill()
    assert it.returncode == 0, err
    said = json.loads((tmp_path / "load.json").read_text())["load"]
    assert said["requests"]["retrieve"] >= said["requests"]["store"] > 1
    assert (said["hit_tokens"], said["wrong"]) == (said["asked_tokens"], []), said["lost"]
    assert keys_in(port) == 0


def test_what_was_evicted_is_a_miss_and_no_failure(run) -> None:
    """Room for fewer prompts than are asked for again."""
    words = ("--kvcache-shape-spec", "(2,16,64,4,64):float32:4", "--set", "tiers.hot.capacity=6MiB")
    code, out, err = run(
        "--load", "400", "--time", "1", "--http", "", "--prompts", "40", "--json", "-", *words
    )
    said = json.loads(out)["load"]
    assert (code, said["wrong"]) == (0, []), err
    assert 0 < said["hit_tokens"] < said["asked_tokens"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kvcache-shape-spec", "(2,2,256,4):float16:2"), "write (2,BLOCKS,TOKENS,HEADS,DIM)"),
        (("--kvcache-shape-spec", "(2,2,256,4,16):flot16:2"), "did you mean 'float16'"),
        (("--kvcache-shape-spec", "(3,2,256,4,16):float16:2"), "begins with 3"),
        (("--kvcache-shape-spec", "(2,0,256,4,16):float16:2"), "at least 1"),
        (("--kvcache-shape-spec", "(1,2,256,4,16):float16:2"), "a latent has 1 head, not 4"),
        (("--kvcache-shape-spec", f"{LATENT};{ODD}", "--use-mla"), "group 2"),
        (("--device", "tpu"), "write cpu or cuda"),
        (("--config", "teired"), "did you mean 'tiered'"),
        (("--set", "tiers.hot.capacity"), "write KEY=VALUE"),
        (("--json", "no/such/folder/x.json"), "cannot write"),
    ],
)
def test_misuse_is_explained(run, words: tuple[str, ...], message: str) -> None:
    code, _, err = run("--once", *words)
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())


def test_no_gpu_is_explained(run) -> None:
    if torch.cuda.is_available():
        assert run("--once", "--device", "cuda")[0] == 0
        return
    code, _, err = run("--once", "--device", "cuda")
    assert (code, "write --device cpu" in err) == (2, True)


def test_shapes_as_they_are_written() -> None:
    spec: Any = " ( 2, 2,256,4 ,16 ) : torch.half : 2 ; (1,8,64,1,72):bf16:3;"
    assert [str(g) for g in kv_groups(spec)] == [DOCUMENTED, LATENT]
