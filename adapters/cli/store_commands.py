"""`tierloom store`: orders to one store or engine, by its door."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from tierloom.stages.errors import ConfigError

store = typer.Typer(
    help="Look after one store or engine, by its door (`tierloom serve --http`, tierloom.http).",
    no_args_is_help=True,
)

Url = Annotated[
    str, typer.Option(envvar="TIERLOOM_DOOR", metavar="URL", help="Its door: http://HOST:PORT.")
]
TokenFile = Annotated[
    str, typer.Option(metavar="FILE", help="File with the token; by default TIERLOOM_TOKEN.")
]
CaFile = Annotated[
    str, typer.Option(metavar="PEM", help="Whom to trust with https://, beside the system's.")
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]
Off = Annotated[bool, typer.Option("--off", help="End it.")]
Tiers = Annotated[list[str] | None, typer.Option("--tier", help="May be repeated. Default: all.")]
Chunks = Annotated[list[str] | None, typer.Option("--chunk", metavar="HEX", help="A chunk's key.")]
Tokens = Annotated[str, typer.Option(metavar="1,2,...", help="Token ids of a prompt.")]
Salt = Annotated[str | None, typer.Option(help="The tenant's.")]
Space = Annotated[str, typer.Option(metavar="HEX", help="The digest of a namespace, or its start.")]
Owner = Annotated[str, typer.Option(help="Who wants it.")]
DOOR = "http://127.0.0.1:7655"


@store.command()
def clear(
    url: Url = DOOR, everything: Annotated[bool, typer.Option("--all", help="All of it.")] = False,
    model: Annotated[str, typer.Option(help="Of this model.")] = "",
    namespace: Space = "", salt: Salt = None,
    older_than: Annotated[str, typer.Option(metavar="TIME", help="There for longer: 12 h.")] = "",
    chunk: Chunks = None, tier: Tiers = None,
    remote: Annotated[
        bool, typer.Option("--remote", help="With --all: also in tiers that others share.")
    ] = False,
    pinned: Annotated[bool, typer.Option("--pinned", help="Also what is pinned.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete them; else they are counted.")] = False,
    token_file: TokenFile = "", ca_file: CaFile = "", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Count the objects that fit all that is said, or delete them."""
    body = {
        "everything": everything, "model": model, "namespace": namespace, "salt": salt,
        "older_than": older_than, "chunks": chunk or [], "tiers": tier or [], "remote": remote,
        "pinned": pinned, "dry_run": not yes,
    }  # fmt: skip
    _order("clear", body, url, token_file, ca_file, as_json=as_json)


@store.command()
def pin(
    owner: Owner, ttl: Annotated[str, typer.Option(metavar="TIME", help="For how long: 10 min.")],
    url: Url = DOOR, tokens: Tokens = "", chunk: Chunks = None, salt: Salt = None,
    namespace: Space = "", token_file: TokenFile = "", ca_file: CaFile = "",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Keep chunks from eviction for a while."""
    body = _chunks(tokens, chunk, salt, namespace) | {"owner": owner, "ttl": ttl}
    _order("pin", body, url, token_file, ca_file, as_json=as_json)


@store.command()
def unpin(
    owner: Owner, url: Url = DOOR, tokens: Tokens = "", chunk: Chunks = None, salt: Salt = None,
    namespace: Space = "", token_file: TokenFile = "", ca_file: CaFile = "",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """End an owner's pins: of these chunks, or all."""
    body = _chunks(tokens, chunk, salt, namespace) | {"owner": owner}
    _order("unpin", body, url, token_file, ca_file, as_json=as_json)


@store.command()
def freeze(
    url: Url = DOOR, tier: Tiers = None, off: Off = False, token_file: TokenFile = "",
    ca_file: CaFile = "", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Put nothing more into tiers, and serve what they have."""
    body = {"on": not off, "tiers": tier or []}
    _order("freeze", body, url, token_file, ca_file, as_json=as_json)


@store.command()
def bypass(
    tier: Annotated[list[str], typer.Option(help="May be repeated.")], url: Url = DOOR,
    off: Off = False, token_file: TokenFile = "", ca_file: CaFile = "", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Neither read nor put into tiers, as if they were down."""
    body = {"on": not off, "tiers": tier}
    _order("bypass", body, url, token_file, ca_file, as_json=as_json)


@store.command()
def drain(
    url: Url = DOOR, off: Off = False, token_file: TokenFile = "", ca_file: CaFile = "",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Take nothing new, serve what is there, and let /readyz say so."""
    _order("drain", {"on": not off}, url, token_file, ca_file, as_json=as_json)


@store.command()
def usage(
    url: Url = DOOR, token_file: TokenFile = "", ca_file: CaFile = "", as_json: AsJson = False
) -> None:
    """Show what is kept of whom, and what is pinned, frozen and bypassed."""
    _order("usage", None, url, token_file, ca_file, as_json=as_json)


@store.command(name="log-level")
def log_level(
    level: Annotated[str, typer.Argument(help="debug, info, warning or error.")], url: Url = DOOR,
    logger: Annotated[str, typer.Option(help="A part of it: tierloom.serve.")] = "tierloom",
    token_file: TokenFile = "", ca_file: CaFile = "", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Change how much it logs."""
    body = {"level": level, "logger": logger}
    _order("log-level", body, url, token_file, ca_file, as_json=as_json)


def _order(
    order: str, body: Mapping[str, Any] | None, url: str, token_file: str, ca_file: str, *,
    as_json: bool,
) -> None:  # fmt: skip
    """Exits with 1 where something of it was not done. Raises ConfigError, TierDown."""
    from tierloom.adapters.door.door_client import DoorClient
    from tierloom.stages.tiers.server.client import read_token

    status, answer = DoorClient(url, read_token(token_file), ca_file=ca_file).call(
        f"/v1/{order}", body
    )
    if status not in (200, 502):
        why = answer.get("detail", answer) if isinstance(answer, dict) else answer
        raise ConfigError(f"{order}: {why}")
    parts: dict[str, dict[str, Any]] = answer["parts"]
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
    else:
        for name, part in parts.items():
            for what, value in part.items():
                typer.echo(f"{name}  {what}: {_text(value)}")
        if order == "clear" and body is not None and body["dry_run"]:
            typer.echo("nothing is deleted: pass --yes for that", err=True)
    if any(part.get("error") or part.get("skipped") for part in parts.values()):
        raise typer.Exit(1)


def _chunks(
    tokens: str, chunk: list[str] | None, salt: str | None, namespace: str
) -> dict[str, Any]:
    """Raises ConfigError."""
    return {
        "tokens": ids_in(tokens),
        "chunks": chunk or [],
        "salt": salt or "",
        "namespace": namespace,
    }


def ids_in(tokens: str) -> list[int]:
    """Raises ConfigError."""
    try:
        return [int(word) for word in tokens.split(",") if word.strip()]
    except ValueError:
        raise ConfigError(f"--tokens {tokens!r:.80}: whole numbers with commas") from None


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k or 'unknown'} {_text(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
