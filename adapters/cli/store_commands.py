"""`tierloom store`: orders to one store or engine, by its door."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from tierloom.adapters.cli.order_options import add_order
from tierloom.pipeline.admin.admin_bodies import BODIES
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
ACCESS: dict[str, tuple[Any, Any]] = {
    "token_file": (TokenFile, ""), "ca_file": (CaFile, ""), "as_json": (AsJson, False)
}  # fmt: skip


def door_answer(
    url: str, path: str, body: Mapping[str, Any] | None, token_file: str, ca_file: str,
    *, also: int = 200, key: str = "",
) -> Any:  # fmt: skip
    """What a door or controller answers. `also`: a status, besides 200, whose body is an answer.
    `key`: with which an order is done once. Raises ConfigError, TierDown."""
    from tierloom.adapters.door.door_client import DoorClient
    from tierloom.stages.tiers.server.client import read_token

    client = DoorClient(url, read_token(token_file), ca_file=ca_file)
    status, answer = client.call(path, body, **({"Idempotency-Key": key} if key else {}))
    if status not in (200, also):
        why = answer.get("detail", answer) if isinstance(answer, dict) else answer
        raise ConfigError(f"{path}: {why}")
    return answer


def _give(order: str, body: dict[str, Any], said: dict[str, Any]) -> None:
    """Exits with 1 where something of it was not done. Raises ConfigError, TierDown."""
    access = said["token_file"], said["ca_file"]
    answer = door_answer(said["url"], f"/v1/{order}", body or None, *access, also=502)
    parts: dict[str, dict[str, Any]] = answer["parts"]
    if said["as_json"]:
        typer.echo(json.dumps(answer, indent=2))
    else:
        for name, part in parts.items():
            for what, value in part.items():
                typer.echo(f"{name}  {what}: {text_of(value)}")
        if body.get("dry_run"):
            typer.echo("nothing is deleted: pass --yes for that", err=True)
    if any(part.get("error") or part.get("skipped") for part in parts.values()):
        raise typer.Exit(1)


def text_of(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k or 'unknown'} {text_of(v)}" for k, v in value.items()) or "none"
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


for _order in BODIES:
    add_order(store, _order, {"url": (Url, "http://127.0.0.1:7655")} | ACCESS, _give)
