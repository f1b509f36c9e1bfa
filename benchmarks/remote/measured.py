"""All that is measured of one tier."""

from __future__ import annotations

import tempfile
import traceback
from pathlib import Path
from typing import Any

import pytest
from cases import SHAPES, Engine, opened
from remote.bare import CLIENTS, beside
from remote.copies import KEPT, TOKENS, copies
from remote.faults import failover, faults
from remote.lookup import lookup
from remote.places import PLACES

BENCHMARKS = Path(__file__).resolve().parents[1]


def measured(name: str, rounds: int) -> dict[str, Any]:
    """All figures of a tier; or why there are none, which ends no other tier's run."""
    found: dict[str, Any] = {}
    # On the disk of this checkout: /tmp may be memory.
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=BENCHMARKS) as made:
        folder = Path(made)
        try:
            engine = Engine(SHAPES["8B"], TOKENS)
            with (
                PLACES[name](folder / "copies", KEPT * engine.shape.objects(TOKENS)) as place,
                opened(engine, {"cold": place.options}) as pipe,
            ):
                found |= copies(pipe, place, engine, rounds)
                if place.servers:
                    found["lookup"] = lookup(pipe)
            del engine, pipe
            if name in CLIENTS:
                found["bare"] = beside(name, folder / "bare", rounds)
            found["faults"] = faults(name, folder / "faults")
            if name == "redis":
                found["failover"] = failover()
        except pytest.skip.Exception as reason:
            found["missing"] = str(reason)
        except Exception as reason:
            traceback.print_exc()
            found["refused"] = f"{type(reason).__name__}: {reason}"
    return found
