"""`make demo-cluster`: two vLLM servers, of which each finds what the other has computed.

SmolLM2 in two OpenAI-compatible servers on this machine, on a CPU, each with a memory and a disk of
its own; a Redis or Valkey that the demo starts tells each what the other has, or, where none is
installed, a list of both. One question about one long document is sent as HTTP clients send it: to
the first, which computes it; to the first again; to the second, which never saw it; and, when the
first was killed, to the second again. All greedy texts must be equal. vLLM's own prefix cache is
off, so what is not computed came through tierloom. Times run from sending a request to its first
text; process start, model load and two short requests that warm each server up are not in them.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tierloom.adapters.demo import smollm2
from tierloom.adapters.demo.directory_server import own_directory, redis_binary
from tierloom.adapters.demo.engine_server import HOST, free_port
from tierloom.adapters.demo.questions import QUESTIONS
from tierloom.adapters.demo.run import Demo, Pair, Verdict, disks
from tierloom.adapters.demo.screen import Answer, bars
from tierloom.adapters.demo.served import Served, run_as_command, serving, streamed
from tierloom.adapters.demo.vllm_server import VllmServer, connector, vllm_version
from tierloom.stages.errors import ConfigError

QUESTION = QUESTIONS[1]
PATIENCE = {"tiers.near.timeout": "1 s", "graphs.retrieve.deadline": "5 s"}
"""Two engines and one client on as few cores as this machine has; and one that is killed may be
asked while it still ends, which must not use up the time of a load."""


class OnCluster(Served):
    """The demo's backend that starts two vLLM servers."""

    restarted = "3 came from the other server, 4 after that was killed"

    def __init__(self) -> None:
        super().__init__("vLLM")

    def run(self, demo: Demo, config: str, folder: Path) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError("vLLM is not installed for this Python: run make demo-cluster")
        with _known_to_each_other(config, folder, self.log) as (pipeline, options, how):
            demo.console.print(
                f"{smollm2.NAME} on two servers of vLLM {vllm_version()} in float32 on CPU, prefix "
                f"caching off, pipeline [bold]{pipeline}[/], {how}. Times are from sending a "
                "request to its first text.\n",
                highlight=False,
            )
            model = smollm2.model_dir()
            servers = [
                VllmServer(
                    model, connector(pipeline, **disks(pipeline, folder / name), **own), self.log
                )
                for name, own in zip(("first", "second"), options, strict=True)
            ]
            with (
                serving(demo.console, first := servers[0], "the first vLLM", "Starting", {}),
                serving(demo.console, second := servers[1], "the second vLLM", "Starting", {}),
            ):
                for server in servers:
                    server.warm_up({})  # now it loads
                self._ask_all(demo, first, second)

    def _ask_all(self, demo: Demo, first: VllmServer, second: VllmServer) -> None:
        demo.title(QUESTION)
        cold = self._ask(demo, first)
        demo.pairs.append(Pair(cold, cold))
        bars(demo.console, [("computed", cold)])
        demo.title("\nAgain, to the same server")
        demo.show(self._ask(demo, first), cold, ("computed", "from its own"))
        demo.title("To the other server, which has not seen it")
        demo.show(self._ask(demo, second), cold, ("computed", "from the first"))
        first.kill()
        demo.title("To the other server again, after the first was killed")
        demo.show(self._ask(demo, second), cold, ("computed", "after the kill"))

    def figures(self, pairs: Sequence[Pair], verdict: Verdict) -> tuple[str, dict[str, Any]]:
        cold, own, peer, after = (kept for kept, _ in pairs)
        sentence = (
            f"First token after {cold.ttft_s:.2f} s; out of the server's own memory after "
            f"{own.ttft_s:.2f} s ({cold.ttft_s / own.ttft_s:.0f} times sooner), out of another "
            f"server's after {peer.ttft_s:.2f} s ({cold.ttft_s / peer.ttft_s:.0f} times). Texts "
            f"{verdict.word}."
        )
        return sentence, {
            "prompt_tokens": peer.prompt_tokens,
            "peer_hit_tokens": peer.hit_tokens,
            "cold_ttft_s": cold.ttft_s,
            "own_hit_ttft_s": own.ttft_s,
            "peer_hit_ttft_s": peer.ttft_s,
            "identical": verdict.identical,
            "identical_after_kill": after.content == cold.content,
        }

    def _ask(self, demo: Demo, server: VllmServer) -> Answer:
        return streamed(demo.console, server, QUESTION, "vLLM answers", {})


@contextlib.contextmanager
def _known_to_each_other(
    config: str, folder: Path, log: Path
) -> Iterator[tuple[str, list[dict[str, Any]], str]]:
    """The pipeline, options of each server, and in words how they find each other."""
    binary = redis_binary()
    if config == "cluster" and binary is not None:
        with own_directory(binary, folder, log) as url:
            named = {"serve.directory": url, "tiers.near.directory": [url]}
            how = f"found through {Path(binary).name}"
            yield config, [{**named, **PATIENCE}, {**named, **PATIENCE}], how
        return
    at = [f"{HOST}:{free_port()}" for _ in range(2)]
    each = [{"serve.listen": a, "tiers.near.directory": at, **PATIENCE} for a in at]
    yield "peer" if config == "cluster" else config, each, "by a list of both"


if __name__ == "__main__":
    about = "Two vLLM servers with tierloom, one killed on the way."
    run_as_command(OnCluster, about, config="cluster")
