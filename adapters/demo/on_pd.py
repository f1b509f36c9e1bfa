"""`make demo-pd`: one vLLM server computes a prompt, another answers it.

SmolLM2 in two OpenAI-compatible servers on this machine, on a CPU, and the requests that a proxy
would send. One question about one long document is asked of the decoder, which computes it; of the
prefiller and then of the decoder, which fetches the KV; of the decoder, which has it by now; of
both at once, so that layers go out as they are computed; and of both, with the prefiller killed
before the decoder asks it for anything. `cache_salt` keeps these apart where nothing kept may help.
All greedy texts must be equal. Times run from sending the decoder its request to its first text.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tierloom.adapters.demo import smollm2
from tierloom.adapters.demo.questions import QUESTIONS, asked
from tierloom.adapters.demo.run import Demo, Pair, Verdict, disks
from tierloom.adapters.demo.screen import Answer, bars, waiting
from tierloom.adapters.demo.served import Served, run_as_command, serving, streamed
from tierloom.adapters.demo.smollm2 import NAME
from tierloom.adapters.demo.vllm_server import HandoffFigures, VllmServer, connector, vllm_version
from tierloom.stages.errors import ConfigError, TierloomError

QUESTION = QUESTIONS[1]
GIVES = {"do_remote_decode": True, "do_remote_prefill": False}
PATIENCE = {"handoff.wait": "20 s"}
"""Four layers of the whole document take a CPU seconds, in which no bytes come."""
WATCHED = ("--worker-extension-cls", f"{HandoffFigures.__module__}.{HandoffFigures.__name__}")


class OnPd(Served):
    """The demo's backend that starts a prefiller and a decoder."""

    restarted = "2 to 4 came from the prefiller, 5 after it was killed"

    def __init__(self) -> None:
        super().__init__("vLLM")
        self.share = 0.0
        """Of what was to land, how much had when the prefiller answered."""
        self.survived = False
        """The answer for which the prefiller was killed was right."""

    def run(self, demo: Demo, config: str, folder: Path) -> None:
        """`config` is the decoder's."""
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError("vLLM is not installed for this Python: run make demo-pd")
        demo.console.print(
            f"{NAME} on two servers of vLLM {vllm_version()} in float32 on CPU, prefix caching "
            f"off, pipelines [bold]prefiller[/] and [bold]{config}[/]. Times are from sending the "
            "decoder its request to its first text.\n",
            highlight=False,
        )
        model = smollm2.model_dir()
        gives = connector("prefiller", **disks("prefiller", folder / "prefiller"))
        lands = connector(config, **disks(config, folder / "decoder"), **PATIENCE)
        prefiller = VllmServer(model, {**gives, "kv_role": "kv_producer"}, self.log)
        decoder = VllmServer(
            model, {**lands, "kv_role": "kv_consumer"}, self.log, flags=WATCHED,
            environment={"VLLM_SERVER_DEV_MODE": "1"},  # it may be asked for its figures
        )  # fmt: skip
        with (
            serving(demo.console, prefiller, "the prefiller's vLLM", "Starting", {}),
            serving(demo.console, decoder, "the decoder's vLLM", "Starting", {}),
        ):
            self._ask_all(demo, prefiller, decoder)

    def _ask_all(self, demo: Demo, prefiller: VllmServer, decoder: VllmServer) -> None:
        def ask(**more: Any) -> Answer:
            return streamed(demo.console, decoder, QUESTION, "vLLM answers", more)

        demo.title(QUESTION)
        cold = ask()
        demo.pairs.append(Pair(cold, cold))
        bars(demo.console, [("computed", cold)])
        demo.title("\nTo the prefiller, and then to the decoder")
        with waiting(demo.console, "The prefiller computes"):
            told = prefill(prefiller, {})
        demo.show(ask(kv_transfer_params=told), cold, ("computed", "handed over"))
        demo.title("To the decoder again")
        demo.show(ask(), cold, ("computed", "from its own"))
        demo.title("To both at once")
        demo.show(self._together(ask, prefiller, decoder, told), cold, ("computed", "both"))
        demo.title("To both, and the prefiller was killed after its answer")
        salt = {"cache_salt": "killed"}
        with waiting(demo.console, "The prefiller computes"):
            told = prefill(prefiller, salt)
        prefiller.kill()
        killed = ask(kv_transfer_params=told, **salt)
        bars(demo.console, [("computed", cold), ("after the kill", killed)])
        self.judge(demo, killed, cold)

    def judge(self, demo: Demo, killed: Answer, cold: Answer) -> None:
        """The answer after the kill. A right one is computed, which no other answer may be."""
        self.survived = killed.content == cold.content
        if not self.survived:
            demo.pairs.append(Pair(killed, cold))

    def _together(
        self, ask: Any, prefiller: VllmServer, decoder: VllmServer, told: dict[str, Any]
    ) -> Answer:
        """The decoder waits already while the prefiller computes. `told`: where that one is."""
        shared = {"cache_salt": "together"}
        name = {"transfer_id": "demo"}
        when: list[int | TierloomError] = []

        def compute() -> None:
            try:
                prefill(prefiller, shared, name)
                when.append(landed_bytes(decoder))
            except TierloomError as error:
                when.append(error)

        before = landed_bytes(decoder)
        thread = threading.Thread(target=compute)
        thread.start()
        try:
            answer: Answer = ask(kv_transfer_params={**told, **name}, **shared)
        finally:
            thread.join()
        (then,) = when
        if isinstance(then, TierloomError):
            raise then
        self.share = (then - before) / max(1, landed_bytes(decoder) - before)
        return answer

    def figures(self, pairs: Sequence[Pair], verdict: Verdict) -> tuple[str, dict[str, Any]]:
        cold, landed, own, *_ = (kept for kept, _ in pairs)
        sentence = (
            f"First token of the decoder after {cold.ttft_s:.2f} s; after {landed.ttft_s:.2f} s "
            f"where the prefiller had computed ({cold.ttft_s / landed.ttft_s:.0f} times sooner), "
            f"out of its own memory after {own.ttft_s:.2f} s. Where both were asked at once, "
            f"{self.share:.0%} had landed when the prefiller answered. Texts {verdict.word}."
        )
        return sentence, {
            "prompt_tokens": landed.prompt_tokens,
            "landed_tokens": landed.hit_tokens,
            "landed_share_when_prefill_answered": self.share,
            "cold_ttft_s": cold.ttft_s,
            "own_hit_ttft_s": own.ttft_s,
            "decoder_ttft_s": landed.ttft_s,
            "identical": verdict.identical,
            "identical_after_prefiller_killed": self.survived,
        }


def prefill(
    server: VllmServer, more: dict[str, Any], params: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What the prefiller says of the question, which it has computed. Raises TierloomError."""
    said = server.post(
        "/v1/chat/completions",
        {
            "model": NAME, "messages": [{"role": "user", "content": asked(QUESTION)}],
            "max_tokens": 1, "temperature": 0, "kv_transfer_params": GIVES | (params or {}), **more,
        },
    )  # fmt: skip
    told = said.get("kv_transfer_params")
    if not told:
        raise TierloomError("the prefiller hands nothing over")
    return dict(told)


def landed_bytes(server: VllmServer) -> int:
    """Bytes of hand-offs that have come to a decoder so far. Raises TierloomError."""
    said = server.post("/collective_rpc", {"method": HandoffFigures.handoff_figures.__name__})
    return int(said["results"][0].get("bytes", 0))


if __name__ == "__main__":
    run_as_command(OnPd, "Two vLLM servers: one computes, one answers.", config="decoder")
