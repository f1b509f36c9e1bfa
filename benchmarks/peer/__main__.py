"""LMCache and tierloom on the same work in the same run, in turns: `make bench-peer`.

    PYTHONPATH=benchmarks .venv-peer/bin/python -m peer [PLACE ...] [--rounds N] [--json FILE]

Each is a process of its own; servers are started anew for each of them, and their CPU time counts.
A round is a store by one, a store by the other, a retrieve by one, a retrieve by the other; who
begins changes from round to round. A store ends when everything is where it is kept; what comes
back is compared byte by byte, and a figure is refused where it differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# In the root, `adapters` and `triton_kernels` would pass for other people's packages.
sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != ROOT]
sys.path.append(str(ROOT / "tests" / "stages" / "tiers"))

import processes  # noqa: E402
import pytest  # noqa: E402
import servers  # noqa: E402
import store_server  # noqa: E402
from yardstick import GB, cpu_of, machine  # noqa: E402

NAMES = ("LMCache", "tierloom")
TOKENS, WARM = 2048, 2
HOW = (
    "CPU seconds of the process and of its server for each 1e9 bytes of KV; a store ends when all "
    "is kept; every byte that came back was compared. LMCache has no connector for paged memory of "
    "a CPU: it was given one that calls its own copy."
)
IMPORTS = {"LMCache": "import lmcache.v1.cache_engine",
           "tierloom": "import tierloom.pipeline.pipeline"}  # fmt: skip


class Place(NamedTuple):
    """Where a subject keeps its objects."""

    address: str
    servers: tuple[int, ...] = ()
    """Processes whose CPU time counts, too."""


@contextlib.contextmanager
def here(name: str, folder: Path) -> Iterator[Place]:
    yield Place(str(folder))


@contextlib.contextmanager
def redis(name: str, folder: Path) -> Iterator[Place]:
    with servers.redis() as server:
        yield Place(f"redis://127.0.0.1:{server.port}", (server.child.pid,))


@contextlib.contextmanager
def server(name: str, folder: Path) -> Iterator[Place]:
    """Each one's own server, over TCP."""
    if name == "tierloom":
        memory = {"hot": {"use": "memory", "capacity": "1600 MiB"}}
        with store_server.process(folder, tiers=memory, arena="512 MiB") as ours:
            yield Place(ours.url, (ours.child.pid,))
        return
    port = processes.free_port()
    command = [sys.executable, "-m", "lmcache.v1.server", "127.0.0.1", str(port), "cpu"]
    theirs = processes.Process(command, port, folder / "lm.log")
    try:
        yield Place(f"lm://127.0.0.1:{port}", (theirs.child.pid,))
    finally:
        theirs.stop()


PLACES: dict[str, Callable[[str, Path], Any]] = {
    "memory": here, "disk": here, "redis": redis, "server": server,
}  # fmt: skip


class Worker:
    """A subject's process."""

    def __init__(self, name: str, place: str, at: Place, tokens: int, log: Path) -> None:
        command = [sys.executable, "-m", "peer.subjects", name, place, at.address, str(tokens)]
        self._servers = at.servers
        with log.open("ab") as err:
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True,
                cwd=log.parent, env={**os.environ, "OMP_NUM_THREADS": "1"},
                preexec_fn=processes.die_with_parent,
            )  # fmt: skip
        self._answer()

    def run(self, word: str, number: int) -> dict[str, Any]:
        """What the subject says, with the CPU seconds of its servers. Raises RuntimeError."""
        spent = cpu_of(*self._servers)
        assert self._child.stdin is not None
        self._child.stdin.write(f"{word} {number}\n")
        self._child.stdin.flush()
        said = self._answer()
        if said["wrong"]:
            raise RuntimeError(said["wrong"])
        return said | {"cpu": said["cpu"] + cpu_of(*self._servers) - spent}

    def close(self) -> None:
        self._child.kill()
        self._child.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"it ended with status {self._child.wait()}")
        said: dict[str, Any] = json.loads(line)
        return said


def measured(place: str, rounds: int, tokens: int) -> dict[str, Any]:
    """Figures of both in one place; or why there are none."""
    took: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=ROOT / "benchmarks") as made:
        workers = {}
        with contextlib.ExitStack() as stack:
            for name in NAMES:
                folder = Path(made) / name
                folder.mkdir()
                log = folder / "log.txt"
                try:
                    at = stack.enter_context(PLACES[place](name, folder))
                    workers[name] = Worker(name, place, at, tokens, log)
                    stack.callback(workers[name].close)
                    for number in range(WARM):
                        for word in ("store", "retrieve", "forget"):
                            workers[name].run(word, number)
                except pytest.skip.Exception as reason:  # its server is not installed
                    return {"refused": str(reason)}
                except (RuntimeError, OSError) as error:
                    tail = log.read_text(errors="replace")[-600:] if log.exists() else ""
                    return {"refused": f"{name}: {error}\n{tail}"}
            for number in range(WARM, WARM + rounds):
                order = NAMES if number % 2 else NAMES[::-1]
                for word in ("store", "retrieve", "forget"):
                    for name in order:
                        try:
                            said = workers[name].run(word, number)
                        except (RuntimeError, OSError) as error:
                            return {"refused": f"{name}: {word} {number}: {error}"}
                        took.setdefault((name, word), []).append(said)
    return {
        f"{name} {word}": {
            "gb_per_s": statistics.median(s["bytes"] / GB / s["wall"] for s in took[name, word]),
            "cpu_s_per_gb": statistics.median(s["cpu"] * GB / s["bytes"] for s in took[name, word]),
            "cpu_least": min(s["cpu"] * GB / s["bytes"] for s in took[name, word]),
            "cpu_most": max(s["cpu"] * GB / s["bytes"] for s in took[name, word]),
        }
        for name in NAMES for word in ("store", "retrieve")
    }  # fmt: skip


def import_seconds(name: str) -> float:
    """CPU seconds of a Python that imports it, its files read before."""
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", IMPORTS[name]], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def table(run: dict[str, Any]) -> str:
    """Markdown, for a README."""
    m = run["machine"]
    where = f"{m['cpu']}, {m['cores']} cores, Python {m['python']}, torch {m['torch']}"
    work = f"{run['tokens']} tokens of Llama-3.1-8B, {run['rounds']} rounds in turns, medians."
    lines = [
        f"{where}, load {m['load']}; {work}", "",
        "| | LMCache CPU s/GB | tierloom CPU s/GB | ratio | LMCache GB/s | tierloom GB/s |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for place, found in run["places"].items():
        if "refused" in found:
            lines.append(f"| {place} | {found['refused'].splitlines()[0]} | | | | |")
            continue
        for word in ("store", "retrieve"):
            theirs, ours = (found[f"{name} {word}"] for name in NAMES)
            lines.append(
                f"| {place}, {word} | {theirs['cpu_s_per_gb']:.2f} | {ours['cpu_s_per_gb']:.2f} | "
                f"{ours['cpu_s_per_gb'] / theirs['cpu_s_per_gb']:.2f} | {theirs['gb_per_s']:.2f} | "
                f"{ours['gb_per_s']:.2f} |"
            )
    theirs, ours = (run["import_s"][name] for name in NAMES)
    lines.append(f"| import, CPU seconds | {theirs:.1f} | {ours:.1f} | {ours / theirs:.2f} | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="peer", description=__doc__.splitlines()[0])
    parser.add_argument("places", metavar="PLACE", nargs="*", help=", ".join(PLACES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    parser.add_argument("--write", metavar="NAME", help="also write results/NAME.md")
    given = parser.parse_args()
    if unknown := set(given.places) - set(PLACES):
        parser.error(f"no place is called {', '.join(unknown)}; known: {', '.join(PLACES)}")
    run: dict[str, Any] = {"machine": machine(), "rounds": given.rounds, "tokens": given.tokens}
    run["import_s"] = {name: import_seconds(name) for name in NAMES}
    run["places"] = {}
    for place in given.places or PLACES:
        run["places"][place] = found = measured(place, given.rounds, given.tokens)
        print(f"{place}: {found.get('refused', 'done')}", file=sys.stderr, flush=True)
    print(table(run))
    if given.write:
        text = (
            f"# LMCache 0.5.6 and tierloom, in turns\n\n`make bench-peer`: {HOW}\n\n{table(run)}\n"
        )
        (ROOT / "benchmarks" / "results" / f"{given.write}.md").write_text(text)
    if given.json:
        given.json.write_text(json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    main()
