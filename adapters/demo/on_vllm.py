"""`make demo-vllm`: a vLLM server that is restarted, and still has its KV.

SmolLM2 in vLLM's OpenAI-compatible server, on a CPU, with the connector. Two questions about one
long document are sent as HTTP clients send them; then the server is restarted and both are sent
again. vLLM's own prefix cache is off, so what is not computed came through tierloom. Each request
is also sent with `tierloom.skip_load`, which has the same server compute all of it: the greedy
texts must be equal. Times run from sending a request to its first text; process start, model load
and one short request that warms vLLM up are not in them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tierloom.adapters.demo import smollm2
from tierloom.adapters.demo.questions import QUESTIONS
from tierloom.adapters.demo.run import Demo, Pair, Verdict, disks
from tierloom.adapters.demo.served import Served, run_as_command, serving, streamed
from tierloom.adapters.demo.vllm_server import VllmServer, connector, vllm_version
from tierloom.stages.errors import ConfigError

SKIP_LOAD = {"kv_transfer_params": {"tierloom.skip_load": True, "tierloom.skip_save": True}}


class OnVllm(Served):
    """The demo's backend that starts a vLLM server."""

    restarted = "3 and 4 are after the restart"

    def __init__(self) -> None:
        super().__init__("vLLM")

    def run(self, demo: Demo, config: str, folder: Path) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError("vLLM is not installed for this Python: run make demo-vllm")
        demo.console.print(
            f"{smollm2.NAME} on vLLM {vllm_version()} in float32 on CPU, prefix caching off, "
            f"pipeline [bold]{config}[/]. Times are from sending a request to its first text.\n",
            highlight=False,
        )
        model = smollm2.model_dir()
        kept = connector(config, **disks(config, folder))
        for what, label in (("Starting", "first request"), ("Restarting", "after restart")):
            server = VllmServer(model, kept, self.log)
            with serving(demo.console, server, self.engine, what, SKIP_LOAD):
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


def _ask_both(demo: Demo, server: VllmServer, question: str, label: str) -> None:
    """Ask with the cache, then without, and show both."""
    demo.title(question)
    kept = streamed(demo.console, server, question, "vLLM looks for the document", {})
    plain = streamed(demo.console, server, question, "vLLM reads the document", SKIP_LOAD)
    demo.show(kept, plain, ("without loading", label))


if __name__ == "__main__":
    run_as_command(OnVllm, "vLLM with tierloom, restarted on the way.")
