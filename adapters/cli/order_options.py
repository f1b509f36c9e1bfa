"""Commands made of orders' bodies: their fields are the options, their doc lines the help."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from inspect import Parameter, Signature
from typing import Annotated, Any

import typer

from tierloom.pipeline.admin.admin_bodies import BODIES
from tierloom.stages.errors import ConfigError
from tierloom.stages.options import field_docs

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
