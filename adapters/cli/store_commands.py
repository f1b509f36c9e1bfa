"""`tierloom store`: orders to one store or engine, by its door. The commands are made of orders'
bodies: their fields are the options, their doc lines the help."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from inspect import Parameter, Signature
from typing import Annotated, Any

import typer

from tierloom.pipeline.admin.admin_bodies import BODIES
from tierloom.stages.errors import ConfigError
from tierloom.stages.options import field_docs

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


_NAMES = {"everything": "--all", "on": "--off", "dry_run": "--yes"}
_HELP = {"on": "End it.", "dry_run": "Delete them; else they are counted."}
"""Of options that say the opposite of their field."""
_KINDS: dict[str, Any] = {
    "bool": bool, "str": str, "str | None": str | None, "list[str]": list[str] | None,
    "list[int]": str, "dict[str, str]": list[str] | None, "dict[str, str] | None": list[str] | None,
}  # fmt: skip
_SHOWN = {"list[int]": "1,2,...", "dict[str, str]": "K=V", "dict[str, str] | None": "K=V"}


def add_order(
    app: typer.Typer, order: str, more: Mapping[str, tuple[Any, Any]],
    act: Callable[[str, dict[str, Any], dict[str, Any]], None],
) -> None:  # fmt: skip
    """A command that fills an order's body and calls `act(order, body, the other options)`. `more`:
    these, by name: type and default."""
    made = BODIES[order]
    docs, own = field_docs(made), fields(made)
    options = {f.name: (_option(f, docs.get(f.name, "")), _default(f)) for f in own}

    def command(**said: Any) -> None:
        body = {f.name: _value(f, said.pop(f.name)) for f in own}
        act(order, {name: value for name, value in body.items() if value is not None}, said)

    parameters = [
        Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind, default=default)
        for name, (kind, default) in (options | dict(more)).items()
    ]
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = made.__doc__
    app.command(name=order)(command)


def pairs_in(words: list[str] | None) -> dict[str, str]:
    """Of `K=V`. Raises ConfigError."""
    found = [word.partition("=") for word in words or []]
    if wrong := ["".join(word) for word in found if not word[1]]:
        raise ConfigError(f"{wrong[0]!r:.80}: write NAME=VALUE")
    return {name: value for name, _, value in found}


def ids_in(tokens: str) -> list[int]:
    """Raises ConfigError."""
    try:
        return [int(word) for word in tokens.split(",") if word.strip()]
    except ValueError:
        raise ConfigError(f"--tokens {tokens!r:.80}: whole numbers with commas") from None


def _option(field: Field[Any], doc: str) -> Any:
    name = _NAMES.get(field.name, "--" + field.name.replace("_", "-"))
    if field.type in ("list[str]", "dict[str, str]", "dict[str, str] | None"):
        name = name.removesuffix("s")
    said = _HELP.get(field.name, " ".join(doc.replace("`", "").split()))
    option = typer.Option(name, help=said, metavar=_SHOWN.get(str(field.type)))
    return Annotated[_KINDS[str(field.type)], option]


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING or (field.type == "list[str]"):
        return "" if field.type == "list[int]" else None
    if field.default is MISSING:
        return Parameter.empty
    return False if field.default is True else field.default


def _value(field: Field[Any], said: Any) -> Any:
    """As the body takes it; None: nothing was said."""
    if field.default is True:
        return not said
    if field.type == "list[int]":
        return ids_in(said)
    if "dict" in str(field.type):
        return pairs_in(said) if said else None
    return said


def ask_door(
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
    answer = ask_door(said["url"], f"/v1/{order}", body or None, *access, also=502)
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
