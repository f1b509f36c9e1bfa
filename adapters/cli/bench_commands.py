"""`tierloom bench`, `bench engine` and `bench pytest`, with their options."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from tierloom.adapters.cli.file_commands import set_options, writable
from tierloom.adapters.cli.load_commands import ALIKE, Device, Figures, Mla, Settings, Shape
from tierloom.stages.errors import ConfigError

bench = typer.Typer(
    help="Measure stores and tiers on this machine, or a running engine: bench engine --help.",
    invoke_without_command=True, context_settings=ALIKE,
)  # fmt: skip


@bench.callback()
def stores(
    context: typer.Context,
    config: Annotated[
        str, typer.Option(help="A preset's name, a YAML file, or an LMCache YAML file.")
    ] = "tiered",
    shape: Shape = "",
    use_mla: Mla = False,
    device: Device = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="That are measured.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before them.")] = 3,
    json: Figures = None,
    settings: Settings = None,
) -> None:
    """Measure store and retrieve on this machine, tier by tier, beside a plain copy.

    Exits with 1 where a byte that came back differs, or something did not come back.
    """
    if context.invoked_subcommand is not None:
        return
    from tierloom.adapters.made_up.store_bench import run_store_bench

    raise typer.Exit(
        run_store_bench(
            config, set_options(settings), shape, use_mla=use_mla, device=device, rounds=rounds,
            warmup=warmup, json=json,
        )
    )  # fmt: skip


@bench.command(
    name="pytest", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def run_pytest(context: typer.Context) -> None:
    """Run `pytest benchmarks` of a checkout, with the remaining arguments."""
    if not ((Path.cwd() / "benchmarks").is_dir() and (Path.cwd() / "pipeline").is_dir()):
        raise ConfigError(
            f"{Path.cwd()} is not a checkout of tierloom: its benchmarks are not here"
        )
    command = [sys.executable, "-m", "pytest", "benchmarks", *context.args]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


@bench.command(context_settings=ALIKE)
def engine(
    workload: Annotated[
        str, typer.Argument(help="multi-round-qa, long-doc-qa, rag, agentic or random.")
    ],
    base_url: Annotated[
        str,
        typer.Option(
            show_default="port 8000 of this host",
            metavar="URL",
            help="Of an OpenAI-compatible server.",
        ),
    ] = "http://localhost:8000/v1",
    model: Annotated[str, typer.Option(help="By default the first that the server has.")] = "",
    num_users: Annotated[int, typer.Option(min=1, help="Sessions at once.")] = 10,
    num_rounds: Annotated[int, typer.Option(min=1, help="Requests of a session.")] = 5,
    qps: Annotated[
        float, typer.Option(min=0, help="Requests that begin per second; 0: as soon as one may.")
    ] = 0.5,
    arrival: Annotated[
        str, typer.Option(metavar="constant|poisson", help="How they are spread in time.")
    ] = "constant",
    shared_system_prompt: Annotated[
        int, typer.Option(min=0, help="Tokens that all sessions begin with.")
    ] = 1000,
    user_history_prompt: Annotated[
        int, typer.Option(min=0, help="Tokens of each session's own.")
    ] = 2000,
    question_len: Annotated[int, typer.Option(min=1, help="Tokens of a question.")] = 16,
    answer_len: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 100,
    documents: Annotated[
        int, typer.Option(min=1, help="long-doc-qa: documents; rag: passages to choose from.")
    ] = 16,
    doc_len: Annotated[int, typer.Option(min=1, help="long-doc-qa: tokens of one.")] = 4000,
    repeat: Annotated[int, typer.Option(min=1, help="long-doc-qa: questions about each.")] = 2,
    top_k: Annotated[int, typer.Option(min=1, help="rag: passages of a prompt.")] = 4,
    chunk_len: Annotated[int, typer.Option(min=1, help="rag: tokens of a passage.")] = 256,
    shuffle: Annotated[
        bool, typer.Option("--shuffle", help="Documents or passages in any order.")
    ] = False,
    branches: Annotated[
        int, typer.Option(min=1, help="agentic: calls that go on from an answer.")
    ] = 2,
    time: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Replace sessions that end, until so long; 0: each once, and no more.",
        ),
    ] = 0.0,
    warmup: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Leave out what was sent before.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of texts and arrivals.")] = 0,
    control: Annotated[
        bool, typer.Option("--control", help="Every second session loads nothing: both in one run.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Ask again without the cache; answers must be equal.")
    ] = False,
    completions: Annotated[
        bool, typer.Option("--completions", help="/v1/completions in place of chats.")
    ] = False,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Answers of full length, where a server can.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for an answer.")] = 600.0,
    init_user_id: Annotated[int, typer.Option(min=0, help="Number of the first session.")] = 0,
    request_with_user_id: Annotated[
        bool, typer.Option("--request-with-user-id", help="Send it as the header x-user-id.")
    ] = False,
    log_interval: Annotated[
        float, typer.Option(min=0, help="Seconds between lines where there is no terminal.")
    ] = 30.0,
    output: Annotated[
        Path | None,
        typer.Option(metavar="F.csv", callback=writable, help="A row for each request."),
    ] = None,
    json: Figures = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="F.svg|F.png", callback=writable, help="A picture.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="F.json", help="Show it beside an earlier run.")
    ] = None,
) -> None:
    """Measure a running engine under a workload: the first token, round by round.

    The API key is OPENAI_API_KEY of the environment. Exits with 1 where a request failed, or an
    answer is not what --verify wants.
    """
    from tierloom.adapters.workload.engine_load import LoadOptions, run_engine_load
    from tierloom.adapters.workload.workloads import WORKLOADS, WorkOptions

    if workload not in WORKLOADS:
        raise typer.BadParameter(f"{workload!r}: one of {', '.join(WORKLOADS)}",
                                 param_hint="WORKLOAD")  # fmt: skip
    if arrival not in ("constant", "poisson"):
        raise typer.BadParameter(f"{arrival!r}: constant or poisson", param_hint="--arrival")
    if time and warmup >= time:
        raise typer.BadParameter(f"{warmup:g} s of {time:g} s: nothing is left to be measured",
                                 param_hint="--warmup")  # fmt: skip
    options = LoadOptions(
        workload=workload, base_url=base_url, model=model, chat=not completions, qps=qps,
        api_key=os.environ.get("OPENAI_API_KEY", ""), poisson=arrival == "poisson", seconds=time,
        warmup=warmup, control=control, verify=verify, ignore_eos=ignore_eos, timeout=timeout,
        name_users=request_with_user_id, log_interval=log_interval, output=output, json=json,
        plot=plot, compare=compare,
    )  # fmt: skip
    work = WorkOptions(
        num_users=num_users, num_rounds=num_rounds, shared_system_prompt=shared_system_prompt,
        user_history_prompt=user_history_prompt, answer_len=answer_len, question_len=question_len,
        documents=documents, doc_len=doc_len, repeat=repeat, top_k=top_k, chunk_len=chunk_len,
        branches=branches, shuffle=shuffle, endless=bool(time), first_user=init_user_id, seed=seed,
    )  # fmt: skip
    raise typer.Exit(run_engine_load(options, work))
