"""What a pipeline takes of memory and disks, beside what there is."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from tierloom.pipeline.config.problems import Findings, Place, Problem
from tierloom.pipeline.config.spec import PipelineSpec
from tierloom.stages.display.amounts import size_text
from tierloom.stages.tiers.contract.tier import Tier
from tierloom.stages.user_home import expanded


def host_memory_of(cls: type[Tier], options: Any) -> dict[str, int]:
    """Options of a tier that take this host's memory, and how many bytes; options may be None."""
    names = ("capacity",) if cls.in_arena else cls.memory_options
    return {name: getattr(options, name, None) or 0 for name in names}


def room_warnings(spec: PipelineSpec, memory: int) -> tuple[Problem, ...]:
    """What runs, but will find less room than it is given. `memory`: bytes of this process."""
    found = Findings()
    tiers = spec.tiers.values()
    taken = spec.budget.arena + sum(
        n for t in tiers for n in host_memory_of(t.cls, t.options).values()
    )
    if taken > memory:
        found.add(
            Place(spec.source), "budget.arena",
            f"requests and tiers take {size_text(taken)} of a memory of {size_text(memory)}",
            "lower it, or the capacity of memory tiers",
        )  # fmt: skip
    asked: dict[int, int] = {}
    for tier in tiers:
        path, capacity = (getattr(tier.options, name, None) for name in ("path", "capacity"))
        if tier.cls.in_arena or not path or not capacity:
            continue
        folder = Path(expanded(path)).absolute()
        there = next(f for f in (folder, *folder.parents) if f.exists())
        device = there.stat().st_dev
        asked[device] = asked.get(device, 0) + capacity - _kept_in(folder)
        if asked[device] > (free := shutil.disk_usage(there).free):
            found.add(
                tier.place, f"tiers.{tier.name}",
                f"{folder}: tiers there may take {size_text(asked[device])} more, and "
                f"{size_text(free)} are free",
                "lower its capacity, or name a folder of a larger file system",
            )  # fmt: skip
    return found.sorted()


def _kept_in(folder: Path) -> int:
    """Bytes of the files of a folder, which need no room any more."""
    total = 0
    for path, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):  # deleted meanwhile
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
    return total
