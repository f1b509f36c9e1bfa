"""`tierloom bench`: a checkout's benchmarks, or else one store and retrieve through the API."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

import tierloom
from tierloom.adapters.demo.screen import screen_for
from tierloom.stages.errors import ConfigError

TOKENS, BLOCK, LAYERS, HEADS, DIM = 8192, 16, 16, 8, 128
GIB = 1 << 30


def run_bench(arguments: list[str]) -> int:
    """Run `pytest benchmarks` with these arguments in a checkout; elsewhere measure here."""
    if (Path.cwd() / "benchmarks").is_dir() and (Path.cwd() / "pipeline").is_dir():
        command = [sys.executable, "-m", "pytest", "benchmarks", *arguments]
        return subprocess.run(command, check=False).returncode
    if arguments:
        raise ConfigError(
            f"bench: {' '.join(arguments)}: nothing here takes it; in a checkout pytest does"
        )
    with tempfile.TemporaryDirectory(prefix="tierloom-bench-") as folder:
        return _measure(folder)


def _measure(folder: str) -> int:
    """Store a prompt's KV and bring it back, from memory and from disk, beside a plain copy."""
    import torch

    shape = (2, TOKENS // BLOCK, BLOCK, HEADS, DIM)
    caches = [torch.randn(shape).to(torch.bfloat16) for _ in range(LAYERS)]
    places = [torch.ones_like(c) for c in caches]  # ones: their pages are then there
    tokens, slots = torch.arange(TOKENS, dtype=torch.int32), torch.arange(TOKENS)
    nbytes = sum(c.nbytes for c in caches)
    rows = {"plain copy": _time(lambda: [p.copy_(c) for p, c in zip(places, caches, strict=True)])}
    overrides = {"tiers.warm.path": folder} | {
        f"graphs.{graph}.deadline": "60 s" for graph in ("store", "retrieve")
    }
    layout = tierloom.KVLayout.from_tensors(caches, order="NHD")
    for start in ("memory", "disk"):  # the second pipeline begins with an empty memory
        with tierloom.open("tiered", layout=layout, model="bench", overrides=overrides) as pipe:
            if start == "memory":
                rows["store"] = _time(lambda: pipe.store(tokens, caches, slots).wait())
            for place in places:
                place.zero_()
            back = _time(lambda: pipe.retrieve(tokens, places, slots).wait())
            rows[f"retrieve from {start}"] = back
        if not all(map(torch.equal, caches, places)):
            screen_for().print(f"[red]the KV that came back from {start} is not what was stored[/]")
            return 1
    title = f"{TOKENS} tokens, {nbytes >> 20} MiB of KV"
    table = Table("", "ms", "GiB/s", "of a copy", title=title)
    for name, seconds in rows.items():
        part = rows["plain copy"] / seconds
        table.add_row(name, f"{seconds * 1e3:.0f}", f"{nbytes / GIB / seconds:.2f}", f"{part:.0%}")
    screen_for().print(table)
    return 0


def _time(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
