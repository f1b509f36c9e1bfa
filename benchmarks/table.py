"""The figures of a run, beside the bars: `python benchmarks/table.py bench.json [--write NAME]`.

`--write NAME` keeps them as `benchmarks/results/NAME.md`, with the machine that they come from.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bars import BARS
from rich.console import Console
from rich.table import Table
from rich.text import Text

COLUMNS = ("benchmark", "GB/s", "CPU s/GB", "of memcpy", "x disk", "other", "bar")
GROUPS = ("store", "retrieve", "kernels", "codecs,", "hash", "graph", "capacity", "text")
OTHER = {
    "m_tokens_per_s": "{:g} M tokens/s", "m_tokens_per_cpu_s": "{:g} per CPU s",
    "of_sha256": "{:.2f} of one sha256", "us_per_chunk": "{:g} us/chunk",
    "us_kernels": "+ {:g} in kernels", "us_wall_per_request": "{:g} us wall/request",
    "resident": "{:.2%} resident", "resident_least": "least {:.2%}", "payload": "{:.2%} payload",
    "mb_per_cpu_s": "{:g} MB per CPU s", "bits": "{:g} bits per element",
    "disk_gb_per_s": "disk {:.2f} GB/s",
    "ms": "{:g} ms", "ms_best": "best {:g} ms", "cpu_ms": "{:g} CPU ms", "index_mb": "{:g} MB",
    "adds_per_s": "{:,} adds per CPU s", "removes_per_s": "{:,} removes per CPU s",
    "longest_ms": "longest add {:g} CPU ms",
}  # fmt: skip

Row = tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("--write", metavar="NAME", help="also write results/NAME.md")
    arguments = parser.parse_args()
    run = json.loads(arguments.json.read_text(encoding="utf-8"))
    rows = [row(b) for b in sorted(run["benchmarks"], key=place)]
    print_table(run, rows)
    if arguments.write:
        path = Path(__file__).parent / "results" / f"{arguments.write}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(markdown(run, rows), encoding="utf-8")
        Console().print(f"written: {path}")


def place(benchmark: dict[str, Any]) -> tuple[int, str]:
    """Its position in the table; within a group as it ran."""
    group = benchmark["group"] or ""
    first = group.partition(" ")[0]
    return (GROUPS.index(first) if first in GROUPS else len(GROUPS), group)


def row(benchmark: dict[str, Any]) -> Row:
    name, figures = benchmark["name"], benchmark["extra_info"]
    return (
        name.removeprefix("test_"),
        both(figures, "gb_per_s", "{:.2f}"),
        both(figures, "cpu_s_per_gb", "{:.3f}"),
        both(figures, "share_of_memcpy", "{:.2f}"),
        both(figures, "wall_vs_disk", "{:.2f}"),
        ", ".join(text.format(figures[key]) for key, text in OTHER.items() if key in figures),
        "; ".join(
            f"{bar}: {'met' if bar.met(figures) else 'MISSED'}"
            for bar in BARS if bar.fits(name, figures)
        ),
    )  # fmt: skip


def both(figures: dict[str, Any], key: str, text: str) -> str:
    """The median, and the best round in brackets."""
    if key not in figures:
        return ""
    return f"{text.format(figures[key])} ({text.format(figures[key + '_best'])})"


def about(run: dict[str, Any]) -> str:
    m = run["machine_info"]["tierloom"]
    commit = run.get("commit_info", {}).get("id", "")[:7]
    return (
        f"{m['cpu']}, {m['cores']} cores, Linux {m['kernel']}, Python {m['python']}, "
        f"torch {m['torch']}; {run['datetime'][:10]}, commit {commit}; "
        f"load {m['load']} before, {m['load_after']} after"
    )


def print_table(run: dict[str, Any], rows: list[Row]) -> None:
    table = Table(title=about(run), caption="median (best round)", caption_justify="left")
    for n, column in enumerate(COLUMNS):
        table.add_column(column, no_wrap=n == 0, justify="left" if n in (0, 5, 6) else "right")
    for cells in rows:
        style = "red" if "MISSED" in cells[-1] else "green"
        table.add_row(*map(Text, cells[:-1]), Text(cells[-1], style))
    Console(width=max(Console().width, 150)).print(table)


def markdown(run: dict[str, Any], rows: list[Row]) -> str:
    lines = [
        "# Figures", "", about(run) + ".", "",
        "Median over rounds, the best round in brackets. What each means: `benchmarks/README.md`.",
        "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(cells) + " |" for cells in rows),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
