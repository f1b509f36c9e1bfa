"""`tierloom bench engine`: what each workload asks, what it measures, and how failures count."""

from __future__ import annotations

import asyncio
import csv
import itertools
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest
import stub_engine
from hypothesis import given, settings, strategies as st

from tierloom.adapters.workload.load_figures import COLUMNS, hit_shares, quantiles
from tierloom.adapters.workload.load_plot import check_plot
from tierloom.adapters.workload.openai_stream import OpenAIStream
from tierloom.stages.errors import ConfigError

LEARNT = 3
"""Requests by which it is learnt how long words are."""
QUICK = ("--qps", "0", "--answer-len", "5")
DOCUMENTED = tuple(
    "--num-users 10 --num-rounds 5 --qps 400 --shared-system-prompt 1000 "  # noqa: SIM905
    "--user-history-prompt 2000 --answer-len 100 --model stub".split()
)
COUNTS = {
    "multi-round-qa": (("--num-users", "3", "--num-rounds", "4"), 12),
    "long-doc-qa": (("--documents", "5", "--repeat", "3", "--doc-len", "600", "--shuffle"), 15),
    "rag": (("--num-users", "3", "--num-rounds", "4", "--documents", "9", "--shuffle"), 12),
    "agentic": (("--num-users", "2", "--num-rounds", "3", "--branches", "2"), 2 * (7 + 1)),
    "random": (("--num-users", "3", "--num-rounds", "2"), 6),
}


def asked(engine) -> list[list[dict[str, str]]]:
    """The messages of all requests but those that learn how long words are."""
    return [seen["body"]["messages"] for seen in engine.seen[LEARNT:]]


@pytest.mark.parametrize("workload", COUNTS)
def test_a_workload(bench, engine, workload) -> None:
    words, count = COUNTS[workload]
    code, said, err = bench(workload, *QUICK, *words)
    assert (code, said["requests"], said["errors"]) == (0, count, {}), err
    assert len(asked(engine)) == count
    assert said["counted_by"] == "the server"
    assert sum(row["requests"] for row in said["rounds"]) == count
    for row in said["rounds"]:
        assert 0 < row["ttft_s"]["p50"] <= row["ttft_s"]["p90"] <= row["ttft_s"]["p99"]
        assert row["answer_tokens"] == 5
        assert set(row["between_tokens_s"]) == {"p50", "p90", "p99"}
    if workload != "agentic":  # whose prompts grow by answers from the first on
        assert abs(said["lengths"]["off"]) < 0.02
    assert "times: p50 / p90 / p99" in err


def test_the_documented_line(bench, engine) -> None:
    code, said, err = bench("multi-round-qa", *DOCUMENTED)
    assert (code, said["requests"], said["errors"]) == (0, 50, {}), err
    assert [row["requests"] for row in said["rounds"]] == [10] * 5
    assert abs(said["lengths"]["off"]) < 0.02
    bodies = [seen["body"] for seen in engine.seen[LEARNT:]]
    assert {b["max_tokens"] for b in bodies} == {100}
    assert {b["messages"][0]["content"] for b in bodies if b["messages"][0]["role"] == "system"}
    assert len({b["messages"][0]["content"] for b in bodies}) == 1, "one system prompt for all"
    assert len({b["messages"][1]["content"] for b in bodies}) == 10, "a history for each"


def test_a_round_has_all_that_was_said_before(bench, engine) -> None:
    bench("multi-round-qa", *QUICK, "--num_users", "1", "--num_rounds", "3")
    first, second, third = asked(engine)
    for earlier, later in ((first, second), (second, third)):
        said = "".join(stub_engine.words(json.dumps(earlier), 5))
        assert later[:-1] == [*earlier, {"role": "assistant", "content": said}]
        assert later[-1]["role"] == "user"


def test_an_agent_goes_on_from_its_answer(bench, engine) -> None:
    bench("agentic", *QUICK, "--num-users", "1", "--num-rounds", "2", "--branches", "3")
    (root,) = [m for m in asked(engine) if len(m) == 2 and "\n" not in m[-1]["content"]]
    below = [m for m in asked(engine) if len(m) == 4]
    assert len(below) == 3
    assert all(m[:2] == root and m[2]["role"] == "assistant" for m in below)
    assert len({m[3]["content"] for m in below}) == 3
    (joined,) = [m for m in asked(engine) if "\n" in m[-1]["content"]]
    answers = ["".join(stub_engine.words(json.dumps(m), 5)) for m in (root, *below)]
    assert joined[-1]["content"] == "\n".join(answers)


def test_passages_are_the_same_texts_in_any_order(bench, engine) -> None:
    words = ("--num-users", "2", "--num-rounds", "9", "--documents", "6", "--top-k", "3")
    orders = {}
    for more in ((), ("--shuffle",)):
        engine.seen.clear()
        bench("rag", *QUICK, *words, *more)
        prompts = [m[-1]["content"].split("\n\n")[:-1] for m in asked(engine)]
        assert {len(passages) for passages in prompts} == {3}
        texts = Counter(text for passages in prompts for text in passages)
        assert len(texts) == 6
        pairs = [(a, b) for p in prompts for a in p for b in p if p.index(a) < p.index(b)]
        orders[more] = len({*pairs} & {(b, a) for a, b in pairs})
    assert orders[()] == 0, "without --shuffle no two passages ever change places"
    assert orders[("--shuffle",)] > 0


def test_one_seed_one_text(bench, engine) -> None:
    runs = []
    for seed in ("1", "1", "2"):
        engine.seen.clear()
        bench("random", *QUICK, "--num-users", "1", "--num-rounds", "2", "--seed", seed)
        runs.append(asked(engine))
    assert runs[0] == runs[1] != runs[2]


def test_sessions_that_end_are_replaced_until_the_time_is_over(bench, engine) -> None:
    words = ("--num-users", "2", "--num-rounds", "2", "--answer-len", "2", "--time", "1")
    code, said, _ = bench("multi-round-qa", *words, "--qps", "30", "--output", "rows.csv")
    rows = list(csv.DictReader(Path("rows.csv").read_text().splitlines()))
    assert code == 0
    assert 4 < len(rows) == said["requests"] <= 30
    assert len({row["user_id"] for row in rows}) > 2
    assert tuple(rows[0]) == COLUMNS
    _, said, _ = bench("random", *words, "--qps", "60", "--arrival", "poisson", "--warmup", "0.5")
    assert said["warm_up_requests"] > 0
    assert said["requests"] > 0


@pytest.mark.parametrize(
    ("fault", "error"),
    [(400, "HTTP 400"), (503, "HTTP 503"), ("half", "cut off"), ("garbage", "cut off"),
     (30.0, "too late")],
)  # fmt: skip
def test_failures_are_counted_by_kind(bench, engine, fault, error) -> None:
    engine.faults = [None] * (LEARNT + 1) + [fault]
    words = ("--num-users", "1", "--num-rounds", "4", "--timeout", "2")
    code, said, err = bench("random", *QUICK, *words)
    assert (code, said["requests"], said["errors"]) == (1, 4, {error: 1}), err
    assert sum(row["errors"] for row in said["rounds"]) == 1
    assert f"failed: 1 x {error}" in err
    assert "Traceback" not in err


def test_nothing_but_failures(bench, engine) -> None:
    engine.faults = [None] * LEARNT + [503] * 3
    words = ("--num-users", "1", "--num-rounds", "3", "--plot", "x.svg", "--output", "x.csv")
    code, said, err = bench("random", *QUICK, *words)
    assert (code, said["errors"], said["requests_per_s"]) == (1, {"HTTP 503": 3}, 0), err
    assert len(Path("x.csv").read_text().splitlines()) == 4
    ElementTree.parse("x.svg")


def test_a_conversation_goes_on_after_a_failure(bench, engine) -> None:
    engine.faults = [None] * (LEARNT + 1) + [500]
    bench("multi-round-qa", *QUICK, "--num-users", "1", "--num-rounds", "3")
    first, lost, third = asked(engine)
    assert third[: len(first)] == first
    assert lost[-1] not in third


def test_an_engine_that_is_killed_under_way(bench, engine, monkeypatch) -> None:
    """What was answered counts, and all else is a failure with its cause."""
    command = [sys.executable, stub_engine.__file__, "1", "0.01"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            port = int(child.stdout.readline())
            monkeypatch.setattr(engine, "port", port)
            asks, asked = OpenAIStream.ask, itertools.count()

            async def ask(self: Any, *args: Any, **named: Any) -> Any:
                if next(asked) == LEARNT + 8:
                    child.kill()
                return await asks(self, *args, **named)

            monkeypatch.setattr(OpenAIStream, "ask", ask)
            code, said, err = bench(
                "random", "--qps", "40", "--answer-len", "9", "--time", "1.5", "--num-users", "4"
            )
        finally:
            child.kill()
    assert code == 1
    assert {"no answer"} <= said["errors"].keys() <= {"no answer", "cut off"}
    assert sum(said["errors"].values()) < said["requests"]
    assert "Traceback" not in err


def test_no_server_at_all(bench, engine, monkeypatch) -> None:
    monkeypatch.setattr(engine, "port", 1)
    code, said, err = bench("random", *QUICK)
    assert (code, said) == (1, {})
    assert err.startswith("tierloom: http://127.0.0.1:1: takes no connection")
    assert "is the server up?" in err
    code, said, err = bench("random", *QUICK, "--model", "m")
    assert (code, said) == (1, {})
    assert "fails at a first prompt of 120 words: no answer" in err


def test_ctrl_c_tells_what_there_is(engine, tmp_path) -> None:
    command = [
        sys.executable, "-m", "tierloom.adapters.cli", "bench", "engine", "random", "--time", "60",
        "--qps", "50", "--answer-len", "2", "--json", str(tmp_path / "x.json"),
        "--base-url", f"http://127.0.0.1:{engine.port}",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as it:
        try:
            end = time.monotonic() + 30
            while len(engine.seen) < 10 and time.monotonic() < end:
                time.sleep(0.05)
            it.send_signal(signal.SIGINT)
            out, err = it.communicate(timeout=20)
        finally:
            it.kill()
    said = json.loads((tmp_path / "x.json").read_text())
    assert it.returncode == 0, err
    assert said["interrupted"]
    assert said["requests"] > 0
    assert "requests/s" in out


def test_control_is_in_the_same_run(bench, engine) -> None:
    words = ("--num-users", "4", "--num-rounds", "3", "--control")
    code, said, err = bench("multi-round-qa", *QUICK, *words)
    assert code == 0
    assert [(r["arm"], r["requests"]) for r in said["all"]] == [("with", 6), ("without", 6)]
    told = [seen["body"].get("kv_transfer_params") for seen in engine.seen[LEARNT:]]
    skip = {"tierloom.skip_load": True, "tierloom.skip_save": True}
    assert (told.count(None), told.count(skip)) == (6, 6)
    assert said["with_of_without"] > 0
    assert "of what it takes without loading, in this run" in err


@pytest.mark.parametrize("moody", [False, True])
def test_verify_asks_again_without_the_cache(bench, engine, moody) -> None:
    engine.moody = moody
    words = ("--num-users", "2", "--num-rounds", "2", "--verify")
    code, said, err = bench("multi-round-qa", *QUICK, *words)
    again = engine.seen[LEARNT + 4 :]
    assert len({seen["body"]["cache_salt"] for seen in again}) == len(again) == 4
    assert code == int(moody)
    assert said["verified"]["different"] == (4 if moody else 0)
    assert ("verified: 4 of 4 answers are equal" in err) is not moody


def test_an_answer_that_cannot_be_asked_again_is_not_called_equal(bench, engine) -> None:
    engine.faults = [None] * (LEARNT + 2) + [400]
    code, said, _ = bench("random", *QUICK, "--num-users", "1", "--num-rounds", "2", "--verify")
    assert (code, said["verified"]["refused"], said["verified"]["different"]) == (1, 1, 0)


def test_a_run_beside_an_earlier_one_and_its_picture(bench, engine) -> None:
    words = ("multi-round-qa", *QUICK, "--num-users", "4", "--num-rounds", "3", "--control")
    _, first, _ = bench(*words)
    Path("first.json").write_text(json.dumps(first))
    engine.faults = [None] * (LEARNT + 1) + [500]
    code, _, err = bench(*words, "--compare", "first.json", "--plot", "x.svg")
    assert code == 1
    assert "beside first.json" in err
    assert "first token, round 2 (with)" in err
    root = ElementTree.parse("x.svg").getroot()
    wide, high = float(root.attrib["width"]), float(root.attrib["height"])
    for part in root.iter():
        for name, most in (("x", wide), ("cx", wide), ("y", high), ("cy", high)):
            assert 0 <= float(part.attrib.get(name, 0)) <= most
    dots = [part for part in root.iter() if part.tag.endswith("circle")]
    assert any(dot.attrib["fill"] == "#c0392b" for dot in dots), "what failed is red"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("chess",), "one of multi-round-qa, long-doc-qa, rag, agentic, random"),
        (("random", "--arrival", "late"), "constant or poisson"),
        (("random", "--time", "5", "--warmup", "9"), "nothing is left to be measured"),
        (("random", "--plot", "x.jpeg"), "ends in .svg or .png"),
        (("random", "--output", "no/such/x.csv"), "cannot write"),
        (("random", "--compare", "none.json"), "--compare none.json"),
        (("random", "--num-users", "0"), "num-users"),
    ],
)
def test_misuse_is_explained(bench, engine, words, message) -> None:
    code, said, err = bench(*words)
    assert (code, said) == (2, {})
    assert message in " ".join(err.replace("│", " ").split())
    assert not engine.seen, "before any work"


def test_a_png_needs_a_program(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"librsvg2-bin.*name an \.svg"):
        check_plot(Path("x.png"))
    (tmp_path / "rsvg-convert").write_text("#!/bin/sh\n")
    (tmp_path / "rsvg-convert").chmod(0o755)
    check_plot(Path("x.png"))


def test_quantiles_are_values_that_occurred() -> None:
    assert quantiles([]) == {}
    assert quantiles([3.0]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0}
    assert quantiles(map(float, range(100, 0, -1))) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}


def test_hit_shares_are_of_the_run_alone() -> None:
    def text(own: int, asked: int, ours: int) -> str:
        return (
            "# HELP vllm:prefix_cache_hits_total x\n"
            f'vllm:prefix_cache_hits_total{{engine="0"}} {own}.0\n'
            f'vllm:prefix_cache_queries_total{{engine="0"}} {asked}\n'
            f'vllm:prefix_cache_queries_total{{engine="1"}} 1e2\n'
            f"vllm:external_prefix_cache_hits_total {ours}\n"
            f"vllm:external_prefix_cache_queries_total {asked - own}\n"
        )

    shares = hit_shares(text(10, 100, 5), text(60, 300, 80))
    assert shares == {"the engine's own cache": 50 / 200, "tierloom": 75 / 150}
    assert hit_shares("", "nothing here 1\n") == {}
    assert hit_shares(text(1, 2, 3), text(1, 2, 3)) == {}


PART = st.sampled_from([
    b"data: ", b"data:[DONE]\n\n", b"\n", b"{}", b"[]", b"null", b'{"choices":[]}', b'{"error":1}',
    b'{"choices":[{"delta":{"content":"x"}}]}', b'{"choices":[{"text":3}]}', b'{"choices":7}',
    b'{"choices":[null]}', b'{"usage":{"prompt_tokens":null}}', b'{"usage":[1]}', b"\xff\xfe", b":",
]) | st.binary(max_size=9)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(PART, max_size=9), st.sampled_from([b"200 OK", b"500 No", b"999 ?"]))
def test_whatever_a_server_sends_is_a_sample(parts: list[bytes], status: bytes) -> None:
    body = b"".join(parts)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 " + status + b"\r\n\r\n" + body)
        writer.close()

    async def run() -> str:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            with closing(OpenAIStream(url, "m", timeout=20)) as client:
                sample = await client.ask([{"role": "user", "content": "x"}], 3)
                assert sample.ended >= sample.sent
                return sample.error

    error = asyncio.run(run())
    assert error or b"[DONE]" in body


def test_a_server_below_a_path_and_its_key(engine) -> None:
    async def run() -> tuple[str, str]:
        url = f"http://127.0.0.1:{engine.port}/a/path/v1/"
        with closing(OpenAIStream(url, "stub", api_key="secret")) as client:
            sample = await client.ask([{"role": "user", "content": "x"}], 3)
            return client.root, sample.error

    assert asyncio.run(run()) == (f"http://127.0.0.1:{engine.port}/a/path", "HTTP 404")
    with pytest.raises(ConfigError, match="--base-url"):
        OpenAIStream("localhost:8000")
    assert httpx.get(f"http://127.0.0.1:{engine.port}/health", trust_env=False).status_code == 200
