"""The demos: questions about one document, and again after a restart.

Each is answered without tierloom and with it, by a model in this process (`in_process.py`), by a
vLLM server (`on_vllm.py`) or by an SGLang server (`on_sglang.py`). Answers are greedy and must be
the same with and without the cache.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tierloom.adapters.demo.screen import STDOUT, Answer, bars, write_figures
from tierloom.pipeline.config.load import load_config
from tierloom.stages.errors import InputError, TierloomError

if TYPE_CHECKING:
    from rich.console import Console

NEW_TOKENS = 24


class Pair(NamedTuple):
    """The same question with the cache, and without."""

    kept: Answer
    plain: Answer


class Verdict(NamedTuple):
    """What a comparison of all pairs found."""

    identical: bool
    word: str
    """For the closing sentence."""
    wrong: str
    """What is wrong, in a sentence; empty: nothing."""


class Backend(Protocol):
    """What computes the answers."""

    restarted: str
    """Which answers were given after the restart."""

    def run(self, demo: Demo, config: str, folder: Path) -> None:
        """Ask everything, in order, with `config` and its KV in `folder`."""

    def figures(self, pairs: Sequence[Pair], verdict: Verdict) -> tuple[str, dict[str, Any]]:
        """The closing sentence, and the figures."""

    def close(self, console: Console, *, failed: bool) -> None:
        """Remove what was needed only for the run."""


class Demo:
    """Shows and collects pairs."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.pairs: list[Pair] = []

    def title(self, text: str) -> None:
        self.console.print(f"[bold]{text}[/]", highlight=False)

    def show(self, kept: Answer, plain: Answer, labels: tuple[str, str]) -> None:
        """A pair is answered: keep it, and show both. `labels`: without the cache, with it."""
        self.pairs.append(Pair(kept, plain))
        bars(self.console, list(zip(labels, (plain, kept), strict=True)))
        self.console.print()


def run_demo(
    backend: Backend, json_path: Path | None = None, config: str = "tiered", keep: bool = False
) -> int:
    """Run the demo on `config` and print it; figures go to `json_path`. Returns the exit status.

    KV is kept in a temporary folder, which is removed afterwards unless `keep`.
    """
    from rich.console import Console

    console, wrong = Console(stderr=json_path == STDOUT), ""
    demo = Demo(console)
    try:
        with _folder(keep, console) as folder:
            backend.run(demo, config, folder)
            verdict = verdict_on(demo.pairs, backend.restarted)
            sentence, figures = backend.figures(demo.pairs, verdict)
            console.print(sentence, highlight=False)
        write_figures(json_path, figures)
        wrong = verdict.wrong
    except TierloomError as e:
        wrong = str(e)
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    finally:
        if wrong:
            console.print(f"tierloom demo: {wrong}", style="red", markup=False, soft_wrap=True)
        backend.close(console, failed=bool(wrong))
    return 1 if wrong else 0


def verdict_on(pairs: Sequence[Pair], restarted: str) -> Verdict:
    """Compare all answers. The first is the one that stores; the others must hit."""
    computed = not any(p.plain.hit_tokens for p in pairs)
    same = [p.kept.content == p.plain.content for p in pairs]
    identical, wrong = computed and all(same), ""
    if not computed or pairs[0].kept.hit_tokens:
        wrong = "a request that should have been computed was not, so nothing is compared"
    elif not identical:
        which = ", ".join(str(i) for i, s in enumerate(same, start=1) if not s)
        wrong = f"answer {which} ({restarted}) differs with and without the cache"
    elif not all(p.kept.hit_tokens for p in pairs[1:]):
        wrong = "stored KV was not found again where it should have been"
    word = "identical" if identical else "DIFFERENT" if computed else "not compared"
    return Verdict(identical, word, wrong)


def disks(config: str, folder: Path) -> Mapping[str, str]:
    """Overrides that put every disk tier of `config` into `folder`.

    Raises ConfigError, and InputError when there is no disk tier.
    """
    names = [name for name, tier in load_config(config).tiers.items() if tier.use == "disk"]
    if not names:
        raise InputError(f"{config} keeps nothing on disk, so nothing would survive the restart")
    return {f"tiers.{name}.path": str(folder / name) for name in names}


@contextlib.contextmanager
def _folder(keep: bool, console: Console) -> Iterator[Path]:
    """A folder for the KV; its path is shown if it is kept."""
    path = Path(tempfile.mkdtemp(prefix="tierloom-demo-"))
    try:
        yield path
    finally:
        if keep:
            console.print(f"KV is kept in {path}", highlight=False, markup=False, soft_wrap=True)
        else:
            shutil.rmtree(path, ignore_errors=True)
