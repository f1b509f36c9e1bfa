"""A demo whose model runs in an engine's server: what is the same for every engine."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tierloom.adapters.demo.engine_server import EngineServer
from tierloom.adapters.demo.questions import asked
from tierloom.adapters.demo.run import NEW_TOKENS, Backend, run_demo
from tierloom.adapters.demo.screen import Answer, waiting

if TYPE_CHECKING:
    from rich.console import Console


class Served:
    """The servers' log: kept where the demo failed."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        fd, name = tempfile.mkstemp(prefix=f"tierloom-{engine.lower()}-", suffix=".log")
        os.close(fd)
        self.log = Path(name)

    def close(self, console: Console, *, failed: bool) -> None:
        if failed and self.log.stat().st_size:
            console.print(f"Log of the server: {self.log}", markup=False, soft_wrap=True)
        else:
            self.log.unlink()


@contextlib.contextmanager
def serving(
    console: Console, server: EngineServer, engine: str, what: str, more: Mapping[str, Any]
) -> Iterator[None]:
    """The server, ready and warm; stopped afterwards. `more`: of the request that warms it up."""
    with server:
        with waiting(console, f"{what} {engine}: imports, model, KV cache"):
            server.wait_ready()
            server.warm_up(more)
        yield
        if server.runs:
            with waiting(console, f"Stopping {engine}"):
                server.stop()


def streamed(
    console: Console, server: EngineServer, question: str, what: str, more: Mapping[str, Any]
) -> Answer:
    """The answer, shown while it arrives; until then, `what` is waited for."""
    with contextlib.ExitStack() as spinner:
        spinner.enter_context(waiting(console, what, say=False))

        def said(piece: str) -> None:
            spinner.close()
            console.print(piece, end="", markup=False, highlight=False)

        answer = server.ask(asked(question), NEW_TOKENS, more, said)
    console.print()
    return answer


def run_as_command(backend: Callable[[], Backend], about: str, config: str = "tiered") -> NoReturn:
    """The command line of such a demo."""
    for end in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(end, _ended)
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to a file")
    parser.add_argument("--config", default=config, help="the pipeline to run")
    given = parser.parse_args()
    sys.exit(run_demo(backend(), given.json, given.config))


def _ended(number: int, _: object) -> NoReturn:
    """A signal that ends this process must end the server first: `with` and `finally` do."""
    sys.exit(128 + number)
