"""What commands show: the screen, figures as JSON, and an answer of the demo as a bar, as long as
its time to first token."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

BESIDE = 58
"""Columns of a row that are not its bar."""
STDOUT = Path("-")
"""What options that name a file take for stdout."""
_WHOLE_LINES = 400
"""Columns of a file, in which nobody would see that a line was cut."""


def screen_for(figures: Path | None = None) -> Console:
    """Where people read: stdout, or stderr where stdout is for `figures`. In a file or
    a pipe lines are whole."""
    from rich.console import Console

    console = Console(stderr=figures == STDOUT, highlight=False)
    if not console.is_terminal:
        console.width = _WHOLE_LINES
    return console


def write_figures(path: Path | None, figures: Any) -> None:
    """As JSON to `path`, or to stdout. None: nowhere. Raises OSError."""
    text = json.dumps(figures, indent=2) + "\n"
    if path == STDOUT:
        sys.stdout.write(text)
    elif path is not None:
        path.write_text(text, encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, greedy."""

    content: Any
    """The new token ids, or the text."""
    ttft_s: float
    """From the call to the first new token or text, lookup and load included."""
    prompt_tokens: int
    hit_tokens: int
    """Tokens of the prompt that were not computed."""


def bars(console: Console, rows: Sequence[tuple[str, Answer]]) -> None:
    """One bar per row."""
    from rich.markup import escape

    width = min(48, max(10, console.width - BESIDE))
    longest = max(answer.ttft_s for _, answer in rows)
    for label, answer in rows:
        length = max(1, round(width * answer.ttft_s / longest))
        color = "green" if answer.hit_tokens else "yellow"
        share = f"{answer.hit_tokens:,} of {answer.prompt_tokens:,} tokens loaded"
        console.print(
            f"  {escape(label):<18}[{color}]{'━' * length}[/]{' ' * (width - length)} "
            f"{answer.ttft_s:7.3f} s   [dim]{share}[/]",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


@contextlib.contextmanager
def waiting(console: Console, what: str, *, say: bool = True) -> Iterator[None]:
    """A spinner; in a log, a line if `say`."""
    if say and not console.is_terminal:
        console.print(f"{what} ...", highlight=False)
    with console.status(what):
        yield
