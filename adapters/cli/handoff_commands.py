"""Commands around prefill here and decode there."""

from __future__ import annotations

from typing import Annotated

import typer

from tierloom.stages.options import parse_seconds

Urls = list[str] | None


def proxy(
    prefill: Annotated[
        Urls, typer.Option(metavar="URL", help="An engine that computes prompts; may be repeated.")
    ] = None,
    decode: Annotated[
        Urls, typer.Option(metavar="URL", help="An engine that answers; may be repeated.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    token_file: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="File with the token of who may change the engines; else TIERLOOM_PROXY_TOKEN.",
        ),
    ] = "",
    way: Annotated[
        str, typer.Option(metavar="auto|after|together", help="When decoders are asked.")
    ] = "auto",
    local_under: Annotated[
        int, typer.Option(min=0, help="Tokens to compute below which a decoder does it.")
    ] = 512,
    prefill_wait: Annotated[
        str, typer.Option(metavar="TIME", help="After it the decoder computes.")
    ] = "2 min",
    probe: Annotated[
        str,
        typer.Option(metavar="TIME", help="How often engines with requests are asked for life."),
    ] = "1 s",
    drain: Annotated[
        str, typer.Option(metavar="TIME", help="Time to finish requests in flight at the end.")
    ] = "30 s",
) -> None:
    """Serve OpenAI's API: prompts are computed by some engines and answered by others.

    tierloom proxy --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200
    """
    from tierloom.adapters.proxy.parts import ProxyParts
    from tierloom.adapters.proxy.run_proxy import run_proxy

    if way not in ("auto", "after", "together"):
        raise typer.BadParameter(f"{way!r}: pass auto, after or together", param_hint="--way")
    parts = ProxyParts(
        way=way,  # type: ignore[arg-type]
        local_under=local_under,
        prefill_wait=_seconds(prefill_wait, "--prefill-wait"),
        probe=_seconds(probe, "--probe"),
    )
    run_proxy(
        parts, prefill or [], decode or [], host=host, port=port, token_file=token_file,
        drain=_seconds(drain, "--drain"), say=typer.echo,
    )  # fmt: skip


def _seconds(text: str, option: str) -> float:
    try:
        return parse_seconds(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
