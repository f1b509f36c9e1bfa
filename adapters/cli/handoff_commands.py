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
    lmcache: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Engines hand over as LMCache does; they tell the proxy here (pd_proxy_host).",
        ),
    ] = "",
    receiver: Annotated[
        Urls,
        typer.Option(
            metavar="INIT/ALLOC",
            help="With --lmcache: ports of each decoder, or of all: pd_peer_init_port and "
            "pd_peer_alloc_port.",
        ),
    ] = None,
    lmcache_wait: Annotated[
        str, typer.Option(metavar="TIME", help="After it the decoder computes what has not come.")
    ] = "5 s",
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
    if lmcache:
        from tierloom.adapters.proxy.lmcache_side import LmcacheSide

        parts.lmcache = LmcacheSide(lmcache, _seconds(lmcache_wait, "--lmcache-wait"))
    run_proxy(
        parts, prefill or [], decode or [], host=host, port=port, token_file=token_file,
        drain=_seconds(drain, "--drain"), say=typer.echo, receivers=receiver or [],
    )  # fmt: skip


def pd(
    model: Annotated[str, typer.Argument(help="What vLLM calls --model.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGS]", help="vLLM's other arguments.")
    ] = None,
    prefill: Annotated[int, typer.Option(min=0, help="Engines that compute prompts.")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="Engines that answer.")] = 1,
    port: Annotated[
        int, typer.Option(min=1, max=65000, help="The proxy's; engines have those from +100 on.")
    ] = 8000,
    devices: Annotated[
        str, typer.Option(metavar="0,1,...", help="GPUs, one for each engine in turn.")
    ] = "",
    wait: Annotated[
        str, typer.Option(metavar="TIME", help="Time for all engines to come up.")
    ] = "10 min",
    start: Annotated[
        bool, typer.Option(help="Start them; else only print the engines' commands.")
    ] = True,
) -> None:
    """Start vLLM engines that compute prompts, others that answer, and the proxy, on this machine.

    tierloom pd --prefill 2 --decode 2 MODEL -- --max-model-len 8192
    """
    from tierloom.adapters.proxy.pd_launch import parsed_devices, planned, run_pd

    counts = {"prefill": prefill, "decode": decode}
    engines = planned(model, counts, port, parsed_devices(devices), arguments or [])

    def serve(prefill: list[str], decode: list[str]) -> None:
        from tierloom.adapters.proxy.parts import ProxyParts
        from tierloom.adapters.proxy.run_proxy import run_proxy

        run_proxy(
            ProxyParts(), prefill, decode, host="127.0.0.1", port=port, token_file="", drain=10,
            say=typer.echo,
        )  # fmt: skip

    run_pd(engines, start=start, wait=_seconds(wait, "--wait"), say=typer.echo, serve=serve)


def _seconds(text: str, option: str) -> float:
    try:
        return parse_seconds(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
