"""The demo in this process: SmolLM2-135M in float32 on a CPU, by transformers.

Times run from the call to the first new token, lookup and load included; starting a process and
loading the model are not in them. After three questions a second process asks the last one again:
`python -m tierloom.adapters.demo.in_process FILE`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierloom.adapters.demo import smollm2
from tierloom.adapters.demo.questions import QUESTIONS, asked
from tierloom.adapters.demo.run import NEW_TOKENS, Demo, Pair, Verdict, disks
from tierloom.adapters.demo.screen import Answer
from tierloom.stages.errors import TierloomError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from tierloom.adapters.transformers.cached_model import CachedModel


class InProcess:
    """The demo's backend that needs no server."""

    restarted = "4 is the restart"

    def __init__(self) -> None:
        # A torch thread that spins at a barrier takes the core from the copy that the model waits
        # for. Read when torch is loaded; the second process inherits it.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._stored = 0

    def run(self, demo: Demo, config: str, folder: Path) -> None:
        console = demo.console
        smollm2.model_dir()
        disks(config, folder)
        with console.status(f"Loading {smollm2.NAME}"):
            model, tokenizer, kept = _loaded(config, folder)
        console.print(
            f"{smollm2.NAME} in float32 on CPU, pipeline [bold]{config}[/]. Times are from the "
            "call to the first new token, lookup and load included; process start and model load "
            "are not.\n",
            highlight=False,
        )
        words = _words(tokenizer, console)
        with kept:
            for question in QUESTIONS:
                ids = prompt(tokenizer, question)
                demo.title(question)
                plain = _ask(model, ids, words)
                answer = _ask_kept(kept, ids, words)
                self._stored += sum(t.wait().nbytes for t in kept.last.storing)
                demo.show(answer, plain, ("without tierloom", "with tierloom"))
        demo.title("The last question again, in a new process")
        again = _restart(ids.tolist(), config, folder, to_stderr=demo.console.stderr)
        demo.show(again, plain, ("without tierloom", "after restart"))

    def figures(self, pairs: Sequence[Pair], verdict: Verdict) -> tuple[str, dict[str, Any]]:
        *first, (again, _) = pairs
        cold = statistics.median(p.plain.ttft_s for p in first)
        warm = statistics.median(p.kept.ttft_s for p in first[1:])
        sentence = (
            f"First token without tierloom after {cold:.2f} s, with what is kept after "
            f"{warm:.2f} s ({cold / warm:.0f} times sooner), after a restart {again.ttft_s:.2f} s "
            f"({cold / again.ttft_s:.0f} times). {self._stored / 1e6:.0f} MB kept. Answers "
            f"{verdict.word}, token by token."
        )
        return sentence, {
            "prompt_tokens": first[-1].kept.prompt_tokens,
            "hit_tokens": first[-1].kept.hit_tokens,
            "cold_ttft_s": cold,
            "store_ttft_s": first[0].kept.ttft_s,
            "warm_ttft_s": warm,
            "restart_ttft_s": again.ttft_s,
            "identical": verdict.identical,
            "stored_bytes": self._stored,
        }

    def close(self, console: Console, *, failed: bool) -> None: ...


def prompt(tokenizer: Any, question: str) -> torch.Tensor:
    """The document and a question as `[1, tokens]` int64."""
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked(question)}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    ids: torch.Tensor = encoded["input_ids"]
    return ids


def _loaded(config: str, folder: Path) -> tuple[Any, Any, CachedModel]:
    """The model, warm, its tokenizer, and the model with a pipeline of its own."""
    import torch

    from tierloom.adapters.transformers.cached_model import CachedModel

    model, tokenizer = smollm2.load_smollm2()
    _ask(model, torch.arange(100, 356).unsqueeze(0))  # torch makes its threads and primitives
    kept = CachedModel(model, config=config, name=smollm2.NAME, overrides=disks(config, folder))
    return model, tokenizer, kept


def _words(tokenizer: Any, console: Console) -> Any:
    """A streamer that prints an answer's text, without prompt and special tokens."""
    from transformers import TextStreamer

    class Words(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            console.print(text, end="\n" if stream_end else "", markup=False, highlight=False)

    return Words(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _ask(model: Any, ids: torch.Tensor, streamer: Any = None) -> Answer:
    """Answer without tierloom."""
    import torch

    from tierloom.adapters.transformers.streamer import Watch

    watch = Watch(streamer)
    started = time.perf_counter()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), streamer=watch,
        max_new_tokens=NEW_TOKENS, do_sample=False,
    )  # fmt: skip
    return _answer(ids, out, watch.first - started, 0)


def _ask_kept(kept: CachedModel, ids: torch.Tensor, streamer: Any) -> Answer:
    """Answer through tierloom; waits afterwards until what it stores is kept."""
    out = kept.generate(ids, streamer=streamer, max_new_tokens=NEW_TOKENS, do_sample=False)
    kept.flush()
    return _answer(ids, out, kept.last.ttft_s, kept.last.hit_tokens)


def _answer(ids: torch.Tensor, out: torch.Tensor, ttft_s: float, hit: int) -> Answer:
    return Answer(out[0, ids.shape[1] :].tolist(), ttft_s, int(ids.shape[1]), hit)


def _restart(ids: list[list[int]], config: str, folder: Path, *, to_stderr: bool) -> Answer:
    """Ask once more in a new process, which finds the KV in `folder`."""
    job, out = folder / "again.json", folder / "answer.json"
    job.write_text(
        json.dumps({"ids": ids, "config": config, "folder": str(folder), "out": str(out)})
    )
    command = [sys.executable, "-m", "tierloom.adapters.demo.in_process", str(job)]
    shown = sys.stderr if to_stderr else None
    done = subprocess.run(command, cwd=folder, stdout=shown, check=False)
    if done.returncode or not out.exists():
        raise TierloomError(f"the second process failed with status {done.returncode}; see above")
    return Answer(**json.loads(out.read_text()))


def _again(job: Path) -> None:
    """The second process: one question through the cache, and the answer into a file."""
    import torch
    from rich.console import Console

    given = json.loads(job.read_text())
    _, tokenizer, kept = _loaded(given["config"], Path(given["folder"]))
    with kept:
        answer = _ask_kept(kept, torch.tensor(given["ids"]), _words(tokenizer, Console()))
    Path(given["out"]).write_text(json.dumps(asdict(answer)))


if __name__ == "__main__":
    _again(Path(sys.argv[1]))
