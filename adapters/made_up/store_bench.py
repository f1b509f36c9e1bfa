"""`tierloom bench`: store and retrieve through each tier, round by round, beside a plain copy."""

from __future__ import annotations

import contextlib
import json as json_text
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tierloom import __version__
from tierloom.adapters.made_up.group_pipelines import any_config
from tierloom.adapters.made_up.kv_groups import KVGroup, kv_groups
from tierloom.adapters.made_up.round_trip import PATIENT, RoundTrip
from tierloom.pipeline.config.load import load_config
from tierloom.pipeline.config.spec import PipelineSpec, TierSpec
from tierloom.pipeline.graph_in_python import as_written
from tierloom.stages.display.amounts import size_text
from tierloom.stages.errors import InputError
from tierloom.stages.kv.geometry import Geometry
from tierloom.stages.kv.object import object_bytes
from tierloom.stages.user_home import expanded

SHAPE = "(2,128,16,8,128):bfloat16:32"
"""2,048 tokens of Llama-3.1-8B: 256 MiB."""
LATENT = "(1,256,16,1,576):bfloat16:61"
"""4,096 tokens of DeepSeek-V3: 275 MiB."""
ROOM = 2
"""Prompts that a tier of this process has room for. Each is deleted after its round, as an eviction
policy may keep older ones and refuse it; memory and disk are those that the warm-up has touched."""
GB = 1e9


class Took(NamedTuple):
    """One operation of one round."""

    wall: float
    cpu: float
    """Seconds of all threads of this process."""
    copy: float
    """Seconds of a plain copy of as many bytes, just before."""


class Copied:
    """A copy of one thread between pages that are there already."""

    def __init__(self, nbytes: int) -> None:
        self._from, self._to = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)

    def __call__(self) -> float:
        start = time.perf_counter()
        np.copyto(self._to, self._from)
        return time.perf_counter() - start


def run_store_bench(
    config: str, overrides: Mapping[str, Any], shape: str, *, use_mla: bool, device: str,
    rounds: int, warmup: int, json: Path | None,
) -> int:  # fmt: skip
    """Measure and tell; the exit code. Raises ConfigError, TierDown, OSError."""
    groups = kv_groups(shape or (LATENT if use_mla else SHAPE), use_mla=use_mla)
    console = Console(stderr=str(json) == "-")
    if not console.is_terminal:
        console.width = max(console.width, 120)
    warned = Console(stderr=True)
    spec = any_config(config, overrides, lambda text: warned.print(f"tierloom: {text}"))
    rows, wrong = [], []
    with Progress(console=warned, transient=True, disable=not warned.is_terminal) as progress:
        for group in groups:
            copied = Copied(group.tokens * group.token_bytes)
            task = progress.add_task(str(group), total=len(spec.tiers) * (rounds + warmup))
            for tier in spec.tiers.values():
                if tier.cls.read_only:
                    continue
                done, bad = _tier(
                    spec, tier, group, copied, device, rounds, warmup,
                    partial(progress.advance, task),
                )  # fmt: skip
                rows += done
                wrong += bad
    if not rows and not wrong:
        wrong.append(f"{spec.source}: no tier that can be written")
    console.print(_table(rows, rounds, warmup))
    for text in wrong:
        warned.print(f"[red]tierloom: {text}[/]", highlight=False)
    figures = {
        "ok": not wrong, "tierloom": __version__, "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "load": os.getloadavg()[0], "config": spec.source, "rounds": rounds, "warmup": warmup,
        "rows": rows, "wrong": wrong,
    }  # fmt: skip
    if json is not None:
        text = json_text.dumps(figures, indent=1)
        print(text) if str(json) == "-" else json.write_text(text + "\n")  # noqa: T201
    return int(bool(wrong))


def one_tier(spec: PipelineSpec, tier: TierSpec, group: KVGroup) -> tuple[PipelineSpec, str]:
    """A pipeline that keeps KV in one tier of a file, as it is, and nowhere else; and the folder
    that is to be removed afterwards, if it makes one. What is this process's own has room for
    `ROOM` prompts, and a folder is one of its own below the file's."""
    whole = as_written(spec)
    options, folder = dict(whole["tiers"][tier.name]), ""
    names = {f.name for f in fields(tier.options)}
    if tier.cls.local and "path" in names:
        folder = options["path"] = f"{options['path']}/bench-{os.getpid()}"
    chunk = spec.chunk
    geometry = Geometry(group.kv, group.layers, group.heads, group.dim, group.dtype, 1)
    each = object_bytes(geometry, chunk.tokens, chunk.grain, chunk.group)
    room = ROOM * each * -(-group.tokens // chunk.tokens)
    if tier.cls.local and "capacity" in names:
        options["capacity"] = room
        if "segment" in names:  # is written in full when it is begun
            options["segment"] = max(4 * each, -(-room // 4))
            options["capacity"] = 4 * options["segment"]
    made = {
        **{key: value for key, value in whole.items() if key in ("version", "order", "chunk")},
        "name": "bench", "tiers": {tier.name: options},
        "budget": {**whole.get("budget", {}), "arena": max(512 << 20, 16 * each)},
        "graphs": {
            "store": {"deadline": "60 s", "stages": {
                "keys": {"use": "hash"}, "fresh": {"use": "lookup", "want": "absent"},
                "pack": {"use": "gather"}, "host": {"use": "to_host"},
                "put": {"use": "put", "tier": tier.name},
            }},
            "retrieve": {"deadline": "60 s", "stages": {
                "keys": {"use": "hash"}, "plan": {"use": "lookup", "want": "prefix"},
                "fetch": {"use": "get"}, "grow": {"use": "decode"}, "place": {"use": "scatter"},
            }},
        },
    }  # fmt: skip
    return load_config(made, said_in=spec.source), folder


def _tier(
    spec: PipelineSpec, tier: TierSpec, group: KVGroup, copied: Copied, device: str, rounds: int,
    warmup: int, advance: Callable[[], None],
) -> tuple[list[dict[str, Any]], list[str]]:  # fmt: skip
    """Rows of the two directions, and what went wrong: then there are none."""
    alone, folder = one_tier(spec, tier, group)
    took: dict[str, list[Took]] = {"store": [], "retrieve": []}
    where = f"{group}: {tier.name}"
    with contextlib.ExitStack() as stack:
        if folder:
            stack.callback(shutil.rmtree, expanded(folder), ignore_errors=True)
        seed = time.time_ns() % (1 << 62)
        trip = RoundTrip(alone, group, model="bench", device=device, seed=seed)
        stack.enter_context(contextlib.closing(trip))
        copied()
        for number in range(warmup + rounds):
            trip.kv.fill(number)
            for graph in took:
                if graph == "retrieve":
                    trip.kv.blank()
                copy, cpu = copied(), time.process_time()
                try:
                    receipt = trip.ask(graph, number, PATIENT)
                except InputError as error:
                    return [], [f"{where}: {error}"]
                cpu = time.process_time() - cpu
                lost = ", ".join(cause.name.lower() for cause in receipt.lost)
                if receipt.tokens != trip.tokens or lost:
                    told = f"{receipt.tokens} of {trip.tokens} tokens ({lost or 'no cause known'})"
                    return [], [f"{where}: {graph} of prompt {number}: {told}"]
                if number >= warmup:
                    took[graph].append(Took(receipt.seconds, cpu, copy))
            if bad := trip.wrong(number, trip.tokens):
                return [], [f"{where}: prompt {number}: {bad}"]
            trip.forget(number)
            advance()
    nbytes = trip.tokens * group.token_bytes
    return [
        {"group": str(group), "tier": tier.name, "use": tier.use, "graph": graph,
         "bytes": nbytes, **_figures(nbytes, done)}
        for graph, done in took.items()
    ], []  # fmt: skip


def _figures(nbytes: int, done: list[Took]) -> dict[str, float]:
    """Medians; and the spread of the speed, from the slowest to the quickest round."""
    rates = sorted(nbytes / GB / t.wall for t in done)
    return {
        "gb_per_s": statistics.median(rates), "gb_per_s_least": rates[0],
        "gb_per_s_most": rates[-1], "spread": (rates[-1] - rates[0]) / statistics.median(rates),
        "cpu_s_per_gb": statistics.median(t.cpu for t in done) / nbytes * GB,
        "of_a_copy": statistics.median(t.copy / t.wall for t in done),
        "copy_gb_per_s": nbytes / GB / statistics.median(t.copy for t in done),
    }  # fmt: skip


def _table(rows: list[dict[str, Any]], rounds: int, warmup: int) -> Table:
    table = Table(
        title=f"{rounds} rounds after {warmup} of warm-up; GB is 1e9 bytes of KV",
        caption="of a copy: beside a plain copy by one thread, just before; median of the rounds",
    )
    table.add_column("tier")
    for name in ("", "KV", "GB/s", "least to most", "CPU s/GB", "of a copy"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row['tier']} ({row['use']})", row["graph"], size_text(row["bytes"]),
            f"{row['gb_per_s']:.2f}", f"{row['gb_per_s_least']:.2f} to {row['gb_per_s_most']:.2f}",
            f"{row['cpu_s_per_gb']:.3f}", f"{row['of_a_copy']:.0%}",
        )  # fmt: skip
    return table
