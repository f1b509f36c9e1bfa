"""`tierloom standalone`, with its options, some of which `tierloom bench` has, too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tierloom.adapters.cli.file_commands import set_options, writable


def alike(word: str) -> str:
    """Options may be written with hyphens and with underscores."""
    return word.replace("_", "-") if len(word) > 1 else word


ALIKE: dict[str, Any] = {"token_normalize_func": alike, "help_option_names": ["-h", "--help"]}
"""For `context_settings`."""


def _figures(path: Path | None) -> Path | None:
    return path if str(path) == "-" else writable(path)


Figures = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", callback=_figures, help="Write figures; -: to stdout."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One more option; may be repeated."),
]
Shape = Annotated[
    str,
    typer.Option(
        "--kvcache-shape-spec", metavar="SPEC",
        help="(2, BLOCKS, TOKENS, HEADS, DIM):DTYPE:LAYERS, 1 in place of 2 for a latent; "
        "more groups after a semicolon.",
    ),
]  # fmt: skip
Mla = Annotated[bool, typer.Option("--use-mla", help="Latents in place of K and V.")]
Device = Annotated[str, typer.Option(metavar="cpu|cuda", help="Where the KV is.")]


def _device(device: str) -> str:
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{device!r}: write cpu or cuda", param_hint="--device")
    return device


def standalone(
    config: Annotated[
        str, typer.Option(help="A preset's name, a YAML file, or an LMCache YAML file.")
    ] = "minimal",
    shape: Shape = "",
    use_mla: Mla = False,
    device: Device = "cpu",
    model: Annotated[
        str, typer.Option("--model-name", help="Whose KV it is called.")
    ] = "standalone",
    http: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Health and metrics here; empty: nowhere.")
    ] = "127.0.0.1:0",
    token_file: Annotated[
        str, typer.Option(metavar="FILE", help="Token of the door; by default TIERLOOM_TOKEN.")
    ] = "",
    load: Annotated[
        float, typer.Option(min=0, metavar="RATE", help="Requests per second; 0: none.")
    ] = 0.0,
    prompts: Annotated[
        int, typer.Option(min=1, help="With --load: prompts that are kept and asked for again.")
    ] = 64,
    again: Annotated[
        float, typer.Option(min=0, max=1, help="With --load: share of requests that ask again.")
    ] = 0.5,
    time: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="End after so long; 0: at a signal.")
    ] = 0.0,
    once: Annotated[
        bool, typer.Option("--once", help="A single round: store, read from each tier, compare.")
    ] = False,
    json: Figures = None,
    seed: Annotated[
        int | None, typer.Option(help="Of prompts and KV; by default another in each run.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Run a pipeline without a model: made-up KV is stored, read back and compared byte by byte.

    Exits with 1 where a byte differs, and says where; with --once also where a tier does not keep
    everything or give it back.
    """
    from tierloom.adapters.made_up.standalone import StandaloneOptions, run_standalone

    told = StandaloneOptions(
        config=config, overrides=set_options(settings), shape=shape, use_mla=use_mla,
        device=_device(device), model=model, http=http, token_file=token_file, load=load,
        prompts=prompts, again=again, seconds=time, once=once, json=json, seed=seed,
    )  # fmt: skip
    raise typer.Exit(run_standalone(told, typer.echo))
