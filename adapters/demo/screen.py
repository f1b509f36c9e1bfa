"""What the demo shows: answers as they come, and a bar per question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich.markup import escape
from transformers import TextStreamer

if TYPE_CHECKING:
    from rich.console import Console

BESIDE = 58
"""Columns of a row that are not its bar."""


class Timed(Protocol):
    """An answer, as far as its bar shows it."""

    @property
    def ttft_s(self) -> float: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def hit_tokens(self) -> int: ...


class Words(TextStreamer):
    """Prints an answer's text while it is generated, without prompt and special tokens."""

    def __init__(self, tokenizer: Any, console: Console) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console = console

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.console.print(text, end="\n" if stream_end else "", markup=False, highlight=False)


def bars(console: Console, rows: Sequence[tuple[str, Timed]]) -> None:
    """One bar per row, as long as its time to first token."""
    width = min(48, max(10, console.width - BESIDE))
    longest = max(answer.ttft_s for _, answer in rows)
    for label, answer in rows:
        length = max(1, round(width * answer.ttft_s / longest))
        colour = "green" if answer.hit_tokens else "yellow"
        share = f"{answer.hit_tokens:,} of {answer.prompt_tokens:,} tokens loaded"
        console.print(
            f"  {escape(label):<18}[{colour}]{'━' * length}[/]{' ' * (width - length)} "
            f"{answer.ttft_s:7.3f} s   [dim]{share}[/]",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
