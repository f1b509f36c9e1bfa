"""`make demo-sglang`: an SGLang server whose KV outlives its own caches, and itself.

SmolLM2 in SGLang's OpenAI-compatible server. One question about one long document is sent as HTTP
clients send it: computed, again after SGLang's caches were emptied (`/flush_cache`), and again in a
restarted server. These have tierloom below HiCache; a third server has it as SGLang's cache linker,
which is asked twice as well. All greedy texts must be equal to the computed one. Times run from
sending a request to its first text; process start, model load and a short request, sent twice to
warm SGLang up, are not in them.

Where there is no GPU, SGLang's CUDA copies between device and host memory are replaced by torch's
(`tests/adapters/sglang/cpu_engine`); all else is SGLang as it is released.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tierloom.adapters.demo import smollm2
from tierloom.adapters.demo.questions import QUESTIONS
from tierloom.adapters.demo.run import Demo, Pair, Verdict, disks
from tierloom.adapters.demo.screen import Answer, bars
from tierloom.adapters.demo.served import Served, run_as_command, serving, streamed
from tierloom.adapters.demo.sglang_server import SglangServer
from tierloom.stages.errors import ConfigError

QUESTION = QUESTIONS[1]
STAND_INS = (
    "There is no GPU here: SGLang's copies between device and host memory are stand-ins made of "
    "torch, and no memory is page-locked. The times say nothing of a GPU."
)


class OnSglang(Served):
    """The demo's backend that starts an SGLang server."""

    restarted = "3 is after the restart, 4 from the linker"

    def __init__(self) -> None:
        super().__init__("SGLang")

    def run(self, demo: Demo, config: str, folder: Path) -> None:
        if importlib.util.find_spec("sglang") is None:
            raise ConfigError("SGLang is not installed for this Python: run make demo-sglang")
        import torch

        gpu = torch.cuda.is_available()
        demo.console.print(
            f"{smollm2.NAME} on SGLang {importlib.metadata.version('sglang')} on "
            f"{torch.cuda.get_device_name() if gpu else 'a CPU in float32'}, pipeline "
            f"[bold]{config}[/]. Times are from sending a request to its first text.",
            highlight=False,
        )
        demo.console.print("\n" if gpu else f"{STAND_INS}\n", highlight=False)
        model = smollm2.model_dir()

        def server(kind: str) -> SglangServer:
            settings = {"tierloom.config": config, **disks(config, folder / kind)}
            return SglangServer(model, settings, self.log, linker=kind == "linker", gpu=gpu)

        with serving(demo.console, first := server("hicache"), self.engine, "Starting", {}):
            demo.title(QUESTION)
            cold = self._ask(demo, first)
            demo.pairs.append(Pair(cold, cold))
            bars(demo.console, [("computed", cold)])
            first.flush()
            demo.title("Again, after SGLang's own caches were emptied")
            demo.show(self._ask(demo, first), cold, ("computed", "after the flush"))
        with serving(demo.console, second := server("hicache"), self.engine, "Restarting", {}):
            demo.title("Again, in a new process")
            demo.show(self._ask(demo, second), cold, ("computed", "after restart"))
        with serving(demo.console, third := server("linker"), self.engine, "Starting", {}):
            demo.title("Twice more, with the cache linker in place of HiCache")
            self._ask(demo, third)
            third.flush()
            demo.show(self._ask(demo, third), cold, ("computed", "linker"))

    def figures(self, pairs: Sequence[Pair], verdict: Verdict) -> tuple[str, dict[str, Any]]:
        cold, hit, restart, linker = (kept for kept, _ in pairs)
        sentence = (
            f"First token after {cold.ttft_s:.2f} s; out of HiCache after {hit.ttft_s:.2f} s "
            f"({cold.ttft_s / hit.ttft_s:.0f} times sooner), in a restarted server after "
            f"{restart.ttft_s:.2f} s ({cold.ttft_s / restart.ttft_s:.0f} times), by the linker "
            f"after {linker.ttft_s:.2f} s. Texts {verdict.word}."
        )
        return sentence, {
            "prompt_tokens": cold.prompt_tokens,
            "hit_tokens": hit.hit_tokens,
            "restart_hit_tokens": restart.hit_tokens,
            "linker_hit_tokens": linker.hit_tokens,
            "cold_ttft_s": cold.ttft_s,
            "hit_ttft_s": hit.ttft_s,
            "restart_ttft_s": restart.ttft_s,
            "identical": verdict.identical,
        }

    def _ask(self, demo: Demo, server: SglangServer) -> Answer:
        return streamed(demo.console, server, QUESTION, "SGLang answers", {})


if __name__ == "__main__":
    run_as_command(OnSglang, "SGLang with tierloom, flushed and restarted on the way.")
