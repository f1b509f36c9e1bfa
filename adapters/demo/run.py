"""`tierloom demo`: three questions about one document, and the last once more after a restart.

A real model (SmolLM2-135M, float32, CPU) reads the document without tierloom, then with it. Times
run from the call to the first new token, lookup and load included; starting a process and loading
the model are not in them. Answers are greedy and must be the same ids with and without the cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierloom.adapters.demo import smollm2
from tierloom.adapters.demo.questions import Answer
from tierloom.stages.errors import TierloomError

if TYPE_CHECKING:
    from rich.console import Console

AGAIN = "--again"
"""What the demo's second process is given: `python -m tierloom.adapters.demo.run --again FILE`."""


def run_demo(json_path: Path | None = None, config: str = "tiered", keep: bool = False) -> int:
    """Run the demo on `config` and print it; figures go to `json_path`. Returns the exit status.

    KV is kept in a temporary folder, which goes afterwards unless `keep`.
    """
    from rich.console import Console

    # A torch thread that spins at a barrier takes the core from the copy that the model waits for.
    # Read when torch is loaded; the second process inherits it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    console = Console()
    try:
        with _folder(keep, console) as folder:
            report, wrong = _demo(console, config, folder)
    except TierloomError as e:
        _complain(console, str(e))
        return 1
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if wrong:
        _complain(console, wrong)
        return 1
    return 0


def _complain(console: Console, sentence: str) -> None:
    console.print(f"tierloom demo: {sentence}", style="red", markup=False, soft_wrap=True)


def _demo(console: Console, config: str, folder: Path) -> tuple[dict[str, Any], str]:
    """Ask everything. Returns the report and what is wrong with it, in a sentence."""
    smollm2.model_dir()
    from tierloom.adapters.demo import questions as demo_ask
    from tierloom.adapters.demo import screen as demo_screen

    overrides = demo_ask.disks(config, folder)
    with console.status(f"Loading {smollm2.NAME}"):
        model, tokenizer = smollm2.load()
        demo_ask.warm_up(model)
        kept = demo_ask.remember(model, config, overrides)
    console.print(
        f"{smollm2.NAME} in float32 on CPU, pipeline [bold]{config}[/]. Times are from the call to "
        "the first new token, lookup and load included; process start and model load are not.\n",
        highlight=False,
    )
    words = demo_screen.Words(tokenizer, console)
    plain: list[Answer] = []
    cached: list[Answer] = []
    stored = 0
    with kept:
        for question in demo_ask.QUESTIONS:
            ids = demo_ask.prompt(tokenizer, question)
            console.print(f"[bold]{question}[/]", highlight=False)
            plain.append(demo_ask.ask(model, ids, words))
            cached.append(demo_ask.ask_kept(kept, ids, words))
            stored += sum(t.wait().nbytes for t in kept.last.storing)
            rows = [("without tierloom", plain[-1]), ("with tierloom", cached[-1])]
            demo_screen.bars(console, rows)
            console.print()
    console.print("[bold]The last question again, in a new process[/]", highlight=False)
    again = _restart(ids.tolist(), config, folder)
    demo_screen.bars(console, [("without tierloom", plain[-1]), ("after restart", again)])
    return _judge(console, plain, cached, again, stored)


def _judge(
    console: Console, plain: list[Answer], cached: list[Answer], again: Answer, stored: int
) -> tuple[dict[str, Any], str]:
    cold = statistics.median(a.ttft_s for a in plain)
    warm = statistics.median(a.ttft_s for a in cached[1:])
    same = [a.ids == b.ids for a, b in zip([*plain, plain[-1]], [*cached, again], strict=True)]
    console.print(
        f"\nFirst token without tierloom after {cold:.2f} s, with what is kept after {warm:.2f} s "
        f"({cold / warm:.0f} times sooner), after a restart {again.ttft_s:.2f} s "
        f"({cold / again.ttft_s:.0f} times). {stored / 1e6:.0f} MB kept. Answers "
        f"{'identical' if all(same) else 'DIFFERENT'}, token by token.",
        highlight=False,
    )
    report = {
        "prompt_tokens": cached[-1].prompt_tokens,
        "hit_tokens": cached[-1].hit_tokens,
        "cold_ttft_s": cold,
        "store_ttft_s": cached[0].ttft_s,
        "warm_ttft_s": warm,
        "restart_ttft_s": again.ttft_s,
        "identical": all(same),
        "stored_bytes": stored,
    }
    wrong = ""
    if not all(same):
        which = ", ".join(str(i + 1) for i, s in enumerate(same) if not s)
        wrong = f"the ids of answer {which} (4 is the restart) differ with and without the cache"
    elif not all(a.hit_tokens for a in [*cached[1:], again]):
        wrong = "kept KV was not found again where it should have been"
    return report, wrong


def _restart(ids: list[list[int]], config: str, folder: Path) -> Answer:
    """Ask once more in a new process, which finds the KV in `folder`."""
    from tierloom.adapters.demo.questions import Answer

    job, out = folder / "again.json", folder / "answer.json"
    job.write_text(
        json.dumps({"ids": ids, "config": config, "folder": str(folder), "out": str(out)})
    )
    command = [sys.executable, "-m", "tierloom.adapters.demo.run", AGAIN, str(job)]
    done = subprocess.run(command, cwd=folder, check=False)
    if done.returncode or not out.exists():
        raise TierloomError(f"the second process failed with status {done.returncode}; see above")
    return Answer(**json.loads(out.read_text()))


def _again(job: Path) -> None:
    """The second process: one question through the cache, and the answer into a file."""
    from rich.console import Console

    asked = json.loads(job.read_text())
    import torch

    from tierloom.adapters.demo import questions as demo_ask
    from tierloom.adapters.demo import screen as demo_screen

    model, tokenizer = smollm2.load()
    demo_ask.warm_up(model)
    overrides = demo_ask.disks(asked["config"], Path(asked["folder"]))
    with demo_ask.remember(model, asked["config"], overrides) as kept:
        words = demo_screen.Words(tokenizer, Console())
        answer = demo_ask.ask_kept(kept, torch.tensor(asked["ids"]), words)
    Path(asked["out"]).write_text(json.dumps(asdict(answer)))


@contextlib.contextmanager
def _folder(keep: bool, console: Console) -> Iterator[Path]:
    """A folder for the KV; its path is shown when it stays."""
    path = Path(tempfile.mkdtemp(prefix="tierloom-demo-"))
    try:
        yield path
    finally:
        if keep:
            console.print(f"KV is kept in {path}", highlight=False, markup=False, soft_wrap=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == [AGAIN] and len(sys.argv) == 3:
        _again(Path(sys.argv[2]))
    else:
        sys.exit(run_demo())
