"""`tierloom bench engine`: a workload against a running engine, and what it came to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import platform
import signal
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tierloom import __version__
from tierloom.adapters.proxy.upstream import EngineFailed
from tierloom.adapters.workload.load_figures import (
    compared_table,
    figures_of,
    hit_shares,
    quantiles,
    rounds_table,
    write_csv,
)
from tierloom.adapters.workload.load_plot import check_plot, write_plot
from tierloom.adapters.workload.openai_stream import OpenAIStream, Sample
from tierloom.adapters.workload.pacing import Pacing, differing
from tierloom.adapters.workload.prose import Prose
from tierloom.adapters.workload.workloads import WorkOptions, sessions_of
from tierloom.stages.display.amounts import time_text
from tierloom.stages.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """What the command was told, besides what each session does."""

    workload: str
    base_url: str
    model: str
    """Empty: the first that the server has."""
    api_key: str
    chat: bool
    qps: float
    poisson: bool
    seconds: float
    warmup: float
    control: bool
    verify: bool
    ignore_eos: bool
    timeout: float
    name_users: bool
    log_interval: float
    output: Path | None
    json: Path | None
    plot: Path | None
    compare: Path | None


def run_engine_load(options: LoadOptions, work: WorkOptions) -> int:
    """Run it and tell; 0 if every request was answered, and as `verify` wants it, else 1. Raises
    ConfigError, TierloomError where the server does not answer at all, OSError."""
    to_stdout = str(options.json) == "-"
    console = Console(stderr=to_stdout)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    if options.plot is not None:
        check_plot(options.plot)
    then = _earlier(options.compare) if options.compare is not None else None
    figures, samples, began = asyncio.run(_run(options, work, console))
    title = (
        f"{options.workload}, {figures['model']} at {figures['server']}: {figures['requests']} "
        f"requests in {figures['seconds']:.1f} s"
    )
    console.print(rounds_table(figures, title))
    _tell(console, figures)
    if then is not None:
        console.print(compared_table(figures, then, str(options.compare)))
    if options.output is not None:
        write_csv(options.output, samples, began)
    if options.json is not None:
        text = json.dumps(figures, indent=1)
        print(text) if to_stdout else options.json.write_text(text + "\n")  # noqa: T201
    if options.plot is not None:
        write_plot(options.plot, figures, samples, began, title)
    verified = figures["verified"] or {}
    wrong = verified.get("different", 0) + verified.get("refused", 0)
    return int(bool(figures["errors"] or wrong or not figures["requests"]))


async def _run(
    options: LoadOptions, work: WorkOptions, console: Console
) -> tuple[dict[str, Any], list[Sample], float]:
    server = OpenAIStream(
        options.base_url, options.model, api_key=options.api_key, chat=options.chat,
        timeout=options.timeout, more={"ignore_eos": True} if options.ignore_eos else {},
    )  # fmt: skip
    with contextlib.closing(server):
        server.model = server.model or await server.first_model()
        prose = Prose(work.seed)
        if not await prose.learn(server):
            console.print("the server counts no tokens: a word is taken for one", style="yellow")
        pacing = Pacing(
            server, users=work.num_users, qps=options.qps, poisson=options.poisson,
            seed=work.seed, answer_len=work.answer_len, seconds=options.seconds,
            warmup=options.warmup, control=options.control, name_users=options.name_users,
            first_user=work.first_user,
        )  # fmt: skip
        before = await _metrics(server)
        run = asyncio.ensure_future(pacing.run(sessions_of(options.workload, work, prose)))
        with _interrupted(run):
            async with _shown(console, pacing, options):
                with contextlib.suppress(asyncio.CancelledError):
                    await run
        seconds = time.perf_counter() - pacing.began
        after = await _metrics(server)
        figures = {
            "tierloom": __version__, "python": platform.python_version(), "server": server.root,
            "model": server.model, "workload": options.workload, "work": asdict(work),
            "qps": options.qps, "arrival": "poisson" if options.poisson else "constant",
            "control": options.control, "interrupted": run.cancelled(), "verified": None,
            **figures_of(pacing.samples, seconds, prose.frames),
            "hits": hit_shares(before, after),
        }  # fmt: skip
        if options.verify:
            mine = [s for s in pacing.samples if not s.error and s.arm == "with"]
            with console.status(f"asking {len(mine)} again, without the cache") as status:
                left = [len(mine)]

                def done() -> None:
                    left[0] -= 1
                    status.update(f"{left[0]} left to be asked again, without the cache")

                figures["verified"] = await differing(server, mine, work.answer_len, done)
        return figures, pacing.samples, pacing.began


async def _metrics(server: OpenAIStream) -> str:
    """The text of /metrics; empty where there is none."""
    try:
        status, body = await server.get("/metrics")
    except EngineFailed:
        return ""
    return body.decode(errors="replace") if status == 200 else ""


@contextlib.contextmanager
def _interrupted(run: asyncio.Future[Any]) -> Any:
    """Ctrl-C ends the run, whose figures are then told; a second one ends the process."""
    loop = asyncio.get_running_loop()

    def end() -> None:
        run.cancel()
        loop.remove_signal_handler(signal.SIGINT)

    with contextlib.suppress(ValueError, RuntimeError):  # not the main thread
        loop.add_signal_handler(signal.SIGINT, end)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, RuntimeError):
            loop.remove_signal_handler(signal.SIGINT)


@contextlib.asynccontextmanager
async def _shown(console: Console, pacing: Pacing, options: LoadOptions) -> AsyncIterator[None]:
    """Progress while it runs: a table on a terminal, else a line now and then."""

    async def show() -> None:
        if console.is_terminal:
            with Live(console=console, transient=True, auto_refresh=False) as live:
                while True:
                    live.update(_progress(pacing, options), refresh=True)
                    await asyncio.sleep(0.5)
        while options.log_interval:
            await asyncio.sleep(options.log_interval)
            good = [s.ttft for s in pacing.samples if not s.error]
            failed = len(pacing.samples) - len(good)
            first = quantiles(good[-50:])
            told = f", first token {time_text(first['p50'])}" if first else ""
            console.print(f"{len(good)} answered, {failed} failed, {pacing.under_way} under "
                          f"way{told}", highlight=False)  # fmt: skip

    task = asyncio.ensure_future(show())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _progress(pacing: Pacing, options: LoadOptions) -> Table:
    seconds = time.perf_counter() - pacing.began
    good = [s for s in pacing.samples if not s.error]
    table = Table.grid(padding=(0, 3))
    limit = f" of {options.seconds:.0f}" if options.seconds else ""
    first, gaps = (
        quantiles(s.ttft for s in good[-50:]),
        quantiles(gap for s in good[-20:] for gap in s.gaps),
    )
    table.add_row(f"{options.workload}", f"{seconds:.0f}{limit} s", f"{len(good)} answered",
                  f"{pacing.under_way} under way",
                  f"[red]{len(pacing.samples) - len(good)} failed[/]")  # fmt: skip
    table.add_row(
        "the last ones", f"first token {time_text(first['p50'])}" if first else "",
        f"between tokens {time_text(gaps['p50'])}" if gaps else "",
        f"{sum(s.answer_tokens for s in good) / max(seconds, 1e-9):.0f} answer tokens/s",
    )  # fmt: skip
    return table


def _tell(console: Console, figures: Mapping[str, Any]) -> None:
    """What is in no table."""
    rates = (f"{figures[f'{what}_per_s']:,.2f} {what.replace('_', ' ')}/s"
             for what in ("requests", "prompt_tokens", "answer_tokens"))  # fmt: skip
    lines = [f"{', '.join(rates)}; tokens counted by {figures['counted_by']}"]
    if figures["lengths"]:
        lines.append(f"prompts: {figures['lengths']['off']:+.1%} off the lengths asked for")
    for cache, share in figures["hits"].items():
        lines.append(f"{cache}: {share:.1%} of the tokens that it was asked for")
    if figures["with_of_without"] is not None:
        lines.append(
            f"first token of rounds >= 2: {figures['with_of_without']:.2f} of what it takes "
            "without loading, in this run"
        )
    if (late := figures["late_s"].get("p99", 0.0)) > 0.5:
        lines.append(
            f"requests began up to {time_text(late)} late (p99): every user was waiting for an "
            "answer; more --num-users, or less --qps"
        )
    if figures["errors"]:
        lines.append("[red]failed: " + ", ".join(
            f"{n} x {kind}" for kind, n in figures["errors"].items()) + "[/]")  # fmt: skip
    if (verified := figures["verified"]) is not None:
        wrong = verified["different"] + verified["refused"]
        said = f"verified: {verified['asked'] - wrong} of {verified['asked']} answers are equal"
        lines.append(f"[red]{said}; {verified['first']}[/]" if wrong else said)
    for line in lines:
        console.print(line, highlight=False)


def _earlier(path: Path) -> Mapping[str, Any]:
    """Figures that --json wrote. Raises ConfigError."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--compare {path}: {error}") from None
    wanted = {"rounds", "requests_per_s", "prompt_tokens_per_s", "answer_tokens_per_s"}
    if not isinstance(found, dict) or not wanted <= found.keys():
        raise ConfigError(f"--compare {path}: not a file that --json of this command wrote")
    return found
