"""`tierloom control`: the controller of many engines, and what it is asked."""

from __future__ import annotations

import json
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from tierloom.adapters.cli.store_commands import (
    ACCESS,
    AsJson,
    CaFile,
    TokenFile,
    add_order,
    ask_door,
    ids_in,
    pairs_in,
)
from tierloom.pipeline.admin.admin_bodies import SENT
from tierloom.stages.errors import ConfigError

control = typer.Typer(help="Which of many engines has what.", no_args_is_help=True)

Url = Annotated[
    str, typer.Option(envvar="TIERLOOM_CONTROL", metavar="URL", help="The controller's address.")
]
Text = Annotated[str, typer.Option(help="The prompt, where the controller has its tokenizer.")]
Model = Annotated[str, typer.Option(help="Engines of this model alone.")]
To = Annotated[list[str], typer.Option(help="An engine; may be repeated. *: all with a door.")]
Key = Annotated[str, typer.Option(help="Sent again by the same, an order is done once.")]
Deadline = Annotated[str, typer.Option(metavar="TIME", help="Then it is left.")]
Tokens = Annotated[str, typer.Option(metavar="1,2,...", help="Token ids of a prompt.")]
Salt = Annotated[str, typer.Option(help="The tenant's.")]
AT = "http://127.0.0.1:9000"


@control.command(name="serve")
def control_serve(
    directory: Annotated[
        str,
        typer.Option(
            envvar="TIERLOOM_DIRECTORY",
            help="Where engines tell what they have: redis://HOST:PORT/DB, directory://HOST:PORT.",
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 9000,
    token_file: TokenFile = "",
    cert: Annotated[Path | None, typer.Option(metavar="PEM", help="For https://.")] = None,
    key: Annotated[Path | None, typer.Option(metavar="PEM", help="For https://.")] = None,
    ca_file: CaFile = "",
    tokenizer: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL=FILE", help="tokenizer.json or its folder; may be repeated."),
    ] = None,
    lmcache_routes: Annotated[
        bool, typer.Option("--lmcache-routes", help="Answer the routes of LMCache's, too.")
    ] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    log_format: Annotated[str, typer.Option(help="text or json, an object a line.")] = "text",
) -> None:
    """Answer over HTTP which engine has how much of a prompt, as the directory says."""
    from tierloom.adapters.controller.run_control import ControlOptions, run_control

    if (cert is None) != (key is None):
        raise ConfigError("--cert and --key go together")
    files = {model: Path(file) for model, file in pairs_in(tokenizer).items()}
    options = ControlOptions(
        directory=directory, host=host, port=port, token_file=token_file, cert=cert, key=key,
        ca_file=ca_file, tokenizers=files, lmcache_routes=lmcache_routes,
    )  # fmt: skip
    run_control(options, log_level=log_level, log_format=log_format, say=typer.echo)


@control.command()
def lookup(
    url: Url = AT, tokens: Tokens = "", text: Text = "", model: Model = "", salt: Salt = "",
    token_file: TokenFile = "", ca_file: CaFile = "", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Show who has how much of a prompt. Exits with 1 where nobody has any of it."""
    body = {"tokens": ids_in(tokens), "text": text, "model": model, "salt": salt}
    said = ask_door(url, "/v1/lookup", body, token_file, ca_file)
    rows = said["instances"]
    _show(said if as_json else {n: _hit(hit) for n, hit in rows.items()}, as_json=as_json)
    raise typer.Exit(0 if rows else 1)


@control.command()
def explain(
    url: Url = AT, tokens: Tokens = "", text: Text = "", model: Model = "", salt: Salt = "",
    token_file: TokenFile = "", ca_file: CaFile = "", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Show why a lookup finds nothing, or so little."""
    body = {"tokens": ids_in(tokens), "text": text, "model": model, "salt": salt}
    said = ask_door(url, "/v1/explain", body, token_file, ca_file)
    rows = {name: f"has {tokens} tokens" for name, tokens in said["found"].items()}
    rows |= {name: "; ".join(why) for name, why in said["reasons"].items()}
    _show(said if as_json else rows, as_json=as_json)


@control.command()
def instances(
    url: Url = AT, token_file: TokenFile = "", ca_file: CaFile = "", as_json: AsJson = False
) -> None:
    """Show the engines that live."""
    said = ask_door(url, "/v1/instances", None, token_file, ca_file)
    rows = {n: f"{i['model']}, {i['workers']} workers, {' '.join(i['tiers'])}; door: "
               f"{i['door'] or 'none'}" for n, i in said.items()}  # fmt: skip
    _show(said if as_json else rows, as_json=as_json)


@control.command()
def health(
    url: Url = AT, token_file: TokenFile = "", ca_file: CaFile = "", as_json: AsJson = False
) -> None:
    """Show what each engine says of itself. Exits with 1 where one is not ready."""
    said = ask_door(url, "/v1/health", None, token_file, ca_file)
    _show(said if as_json else {"": f"directory {said['status']}"} | said["instances"],
          as_json=as_json)  # fmt: skip
    well = {"ready", "alive"} >= {said["status"], *said["instances"].values()}
    raise typer.Exit(0 if well else 1)


@control.command()
def move(
    source: Annotated[str, typer.Argument(help="The engine that has it.")],
    target: Annotated[str, typer.Argument(help="The engine that is to have it.")],
    tokens: Tokens, url: Url = AT, salt: Salt = "",
    copy: Annotated[bool, typer.Option("--copy", help="Leave it at the source, too.")] = False,
    key: Key = "",
    token_file: TokenFile = "", ca_file: CaFile = "", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Bring a prompt from one engine's tiers into another's memory."""
    body = {"source": source, "target": target, "tokens": ids_in(tokens), "salt": salt,
            "copy": copy}  # fmt: skip
    said = ask_door(url, "/v1/move", body, token_file, ca_file, key=key)
    text = f"{said['moved']} of {said['chunks']} chunks, {said['tokens']} tokens: {said['state']}"
    _show(said if as_json else {"": text}, as_json=as_json)
    raise typer.Exit(0 if said["state"] == "done" and said["moved"] == said["chunks"] else 1)


@control.command()
def order(
    id: Annotated[str, typer.Argument(help="As it was answered.")], url: Url = AT,
    token_file: TokenFile = "", ca_file: CaFile = "", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Show how far an order is, or what came of it. Exits with 1 where it is not done."""
    _ordered(ask_door(url, f"/v1/orders/{quote(id)}", None, token_file, ca_file), as_json=as_json)


def _ordered(said: Any, *, as_json: bool) -> None:
    rows = {n: f"{i['state']}  {i.get('detail') or i.get('parts', '')}"
            for n, i in said["instances"].items()}  # fmt: skip
    _show(said if as_json else {"": f"{said['id']}: {said['state']}"} | rows, as_json=as_json)
    raise typer.Exit(0 if said["state"] == "done" else 1)


def _show(said: Any, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(said, indent=2))
    else:
        for name, text in said.items():
            typer.echo(f"{name}  {text}" if name else text)


def _hit(hit: dict[str, Any]) -> str:
    where = ", ".join(f"{n} in {tier}" for tier, n in hit["tiers"].items())
    return f"{hit['tokens']} tokens, {hit['bytes']} bytes ({where})"


def _give(order: str, body: dict[str, Any], said: dict[str, Any]) -> None:
    sent = {"instances": said["to"], "body": body, "deadline": said["deadline"]}
    access = said["token_file"], said["ca_file"]
    answer = ask_door(said["url"], f"/v1/{order}", sent, *access, key=said["key"])
    _ordered(answer, as_json=said["as_json"])


_SENDING: dict[str, tuple[Any, Any]] = {
    "to": (To, Parameter.empty), "url": (Url, AT), "key": (Key, ""), "deadline": (Deadline, "60 s"),
}  # fmt: skip
for _order in SENT:
    add_order(control, _order, _SENDING | ACCESS, _give)
