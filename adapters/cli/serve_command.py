"""`tierloom serve`, with its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tierloom.stages.options import parse_seconds


def serve(
    config: Annotated[
        str, typer.Option(help="A preset's name or a YAML file; its tiers are the store.")
    ] = "shared",
    listen: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", help="tcp://HOST:PORT, tls://HOST:PORT or unix:///PATH; may be repeated."
        ),
    ] = None,
    token_file: Annotated[
        str, typer.Option(metavar="FILE", help="File with the token; by default TIERLOOM_TOKEN.")
    ] = "",
    cert: Annotated[
        Path | None, typer.Option(metavar="PEM", help="For tls:// and https://.")
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="PEM", help="For tls://.")] = None,
    without_token: Annotated[
        bool, typer.Option("--without-token", help="Accept other hosts without a token.")
    ] = False,
    clients: Annotated[int, typer.Option(min=1, help="Most connections at once.")] = 512,
    drain: Annotated[
        str, typer.Option(metavar="TIME", help="Time to finish requests in flight at the end.")
    ] = "10 s",
    directory: Annotated[
        str,
        typer.Option(
            help="embedded: host a directory of what engines serve, directory://HOST:PORT to them."
        ),
    ] = "",
    http: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help="Health and metrics here; https://HOST:PORT: TLS."),
    ] = "",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    log_format: Annotated[str, typer.Option(help="text or json, an object a line.")] = "text",
) -> None:
    """Keep objects for many engines, whose pipelines have a tier that uses `server`."""
    from tierloom.adapters.server.serve import run_serve

    try:
        seconds = parse_seconds(drain)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--drain") from None
    run_serve(
        config, listen or ["tcp://127.0.0.1:7654"], token_file=token_file, cert=cert, key=key,
        without_token=without_token, clients=clients, drain=seconds,
        directory=directory, http=http, log_level=log_level, log_format=log_format,
        say=typer.echo,
    )  # fmt: skip
