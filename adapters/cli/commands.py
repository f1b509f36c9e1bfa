"""The command line. A user's mistake is explained and exits with 2; never a traceback."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from tierloom import __version__
from tierloom.adapters.cli import (
    bench_commands,
    control_commands,
    file_commands,
    handoff_commands,
    load_commands,
    serve_command,
    store_commands,
)
from tierloom.adapters.cli.file_commands import writable, writable_or_stdout
from tierloom.adapters.server.deploy import deploy
from tierloom.stages.errors import ConfigError, TierloomError

app = typer.Typer(
    name="tierloom",
    help="Store the KV cache of language models and reuse it when the same text comes again.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Figures = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="PATH", callback=writable, help="Write the figures to a file; -: stdout."
    ),
]


def main() -> None:
    """Entry point of the `tierloom` command."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows only ASCII is no error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app()
    except ConfigError as e:
        typer.echo(e, err=True)
        sys.exit(2)
    except TierloomError as e:
        typer.echo(f"tierloom: {e}", err=True)
        sys.exit(1)
    except OSError as e:
        typer.echo(f"tierloom: {e}", err=True)
        sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tierloom {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command()(file_commands.check)
app.command()(file_commands.explain)


@app.command()
def schema(
    write: Annotated[
        Path | None,
        typer.Option(
            "--write", metavar="PATH", callback=writable_or_stdout, help="Write it to a file."
        ),
    ] = None,
) -> None:
    """Print the JSON Schema of pipeline files, for editors."""
    from tierloom.pipeline.config.schema import schema_text

    if write is None:
        typer.echo(schema_text(), nl=False)
    else:
        write.write_text(schema_text(), encoding="utf-8")


@app.command(name="import-lmcache")
def import_lmcache(
    file: Annotated[
        Path | None,
        typer.Argument(help="LMCache's YAML; by default the LMCACHE_* variables that it reads."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="PATH", callback=writable_or_stdout, help="Write to a file; -: stdout."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --out.")] = False,
) -> None:
    """Convert an LMCache configuration to a tierloom one, and list what has no counterpart.

    Exits with 1 where something that was asked for is not done: stderr and the file say what.
    """
    from tierloom.adapters.lmcache.convert import run_import

    if out is not None and out.is_file() and not force:
        raise ConfigError(f"{out} is there already: name another, or replace it by --force")
    raise typer.Exit(run_import(file, out))


@app.command()
def inspect(
    object: Annotated[
        str,
        typer.Argument(
            help="A file of a `files` tier; FOLDER@KEY of a disk tier, or FOLDER.", metavar="OBJECT"
        ),
    ],
    as_json: file_commands.AsJson = False,
) -> None:
    """Show the header of a stored object, and verify every byte of it; or list a disk's folder.

    Exits with 0 if it is intact, with 1 if it is damaged, with 2 if it is not an object.
    """
    from tierloom.adapters.cli.inspect_object import inspect_object

    raise typer.Exit(inspect_object(object, as_json=as_json))


app.command()(file_commands.doctor)


@app.command()
def demo(
    json: Figures = None,
    config: Annotated[str, typer.Option(help="The pipeline to run.")] = "tiered",
    keep: Annotated[bool, typer.Option("--keep", help="Do not remove the demo's folder.")] = False,
) -> None:
    """Run a real model with and without tierloom, and compare time and text."""
    from tierloom.adapters.demo.in_process import InProcess
    from tierloom.adapters.demo.run import run_demo

    raise typer.Exit(run_demo(InProcess(), json, config, keep))


@app.command()
def quality(
    codec: Annotated[
        str, typer.Option(help="int4, cachegen:default, turboquant:bits=4, chains a+b; or none.")
    ] = "",
    blend: Annotated[
        str, typer.Option(metavar="POLICY", help="probe, heads, deviation, none: blending instead.")
    ] = "",
    set: Annotated[
        str, typer.Option(metavar="rag|edit|seq", help="With --blend: the prompts.")
    ] = "rag",
    model: Annotated[
        str, typer.Option(metavar="smollm2|DIR", help="The model to measure on.")
    ] = "smollm2",
    json: Figures = None,
    documents: Annotated[
        int | None, typer.Option(min=1, help="Use fewer documents: faster, and less certain.")
    ] = None,
) -> None:
    """Measure what a codec, or blending, costs a model in quality, and what it takes."""
    if bool(codec) == bool(blend):
        raise typer.BadParameter("pass one of --codec and --blend")
    if blend:
        from tierloom.adapters.quality.blend_report import run_blend

        raise typer.Exit(run_blend(model, blend, set, json, documents))
    from tierloom.adapters.quality.report import run_quality

    raise typer.Exit(run_quality(model, codec, json, documents))


@app.command()
def warm(
    files: Annotated[list[Path], typer.Argument(help="Text files, cut into passages.")],
    url: Annotated[str, typer.Option(help="An OpenAI-compatible server.")],
    system: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The text that prompts begin with.")
    ] = None,
    model: Annotated[str, typer.Option(help="Default: the first that the server has.")] = "",
    prompt: Annotated[int, typer.Option(metavar="N", help="Characters of a prompt.")] = 12000,
    passage: Annotated[int, typer.Option(metavar="N", help="Characters of a passage.")] = 2000,
    token_file: Annotated[Path | None, typer.Option(metavar="FILE", help="API key.")] = None,
) -> None:
    """Have a server compute a corpus, several passages to a prompt, so that it is kept."""
    from tierloom.adapters.workload.warm import run_warm

    raise typer.Exit(
        run_warm(
            url, files, system=system, model=model, prompt=prompt, passage=passage,
            token_file=token_file,
        )
    )  # fmt: skip


@app.command()
def calibrate(
    model: Annotated[
        str, typer.Option(metavar="smollm2|DIR", help="The model to learn from.")
    ] = "smollm2",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", callback=writable, help="Default: where the codec finds it."
        ),
    ] = None,
    transform: Annotated[
        bool,
        typer.Option(
            help="Also a transform of each head, for level small: better, and slower to decode."
        ),
    ] = True,
) -> None:
    """Learn once how to encode a model's KV best; the codec `cachegen` finds the file by itself."""
    from tierloom.adapters.quality.calibrate import run_calibrate

    raise typer.Exit(run_calibrate(model, out, transform))


@app.command()
def sglang(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- ARGS]", help="With --exec: SGLang's other arguments."),
    ] = None,
    linker: Annotated[
        bool, typer.Option("--linker", help="SGLang's cache linker in place of HiCache.")
    ] = False,
    config: Annotated[
        str, typer.Option(envvar="TIERLOOM_CONFIG", help="A preset's name or a YAML file.")
    ] = "tiered",
    page_size: Annotated[int, typer.Option(help="Tokens of a page of SGLang's.")] = 32,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One more option; may be repeated."),
    ] = None,
    execute: Annotated[
        bool, typer.Option("--exec", help="Start sglang.launch_server with the flags and ARGS.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Say what would be refused here; no model is loaded.")
    ] = False,
) -> None:
    """Print the flags by which SGLang uses tierloom, for a shell; or start SGLang with them.

    tierloom sglang --set tiers.hot.capacity='64 GiB' --exec -- --model-path MODEL
    """
    from tierloom.adapters.cli.sglang_launch import run_sglang

    raise typer.Exit(
        run_sglang(
            config, settings or [], page_size, arguments or [], linker=linker, execute=execute,
            check=check,
        )
    )  # fmt: skip


app.command()(serve_command.serve)
app.add_typer(store_commands.store, name="store")
app.add_typer(control_commands.control, name="control")
app.command()(handoff_commands.proxy)
app.command()(handoff_commands.pd)
app.command()(deploy)
app.command(context_settings=load_commands.ALIKE)(load_commands.standalone)
app.add_typer(bench_commands.bench, name="bench")
