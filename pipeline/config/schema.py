"""JSON Schema (draft 2020-12) of a pipeline file, made from the options classes themselves.

For editors: completion, and each option's doc line as it is typed. `check` stays the judge; it also
knows ports, names and bases. Where a value may be written with a unit or come from a variable, the
schema says text.
"""

from __future__ import annotations

import json
import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tierloom.pipeline.config.load import GRAPHS
from tierloom.pipeline.config.presets import VERSION
from tierloom.pipeline.config.spec import Breaker, GraphOptions, PipelineOptions, Wire
from tierloom.stages import catalog
from tierloom.stages.options import field_docs, parse_rate, parse_seconds, parse_size, seconds_text
from tierloom.stages.tiers.contract.tier import Inner

_VARIABLE = {"type": "string", "pattern": r"\$\{"}
_URL = {
    "type": "string",
    "pattern": r"^[A-Za-z][A-Za-z0-9+.-]*://|\$\{",
    "description": "A URL says which tier to use, and is its `url`; it may also stand in `use`.",
}
_TIME = {"minimum": 0, "maximum": 0, "pattern": r"[A-Za-z]|^[\s0.]*$"}
"""A time has a unit, or is 0."""
_SIMPLE: dict[Any, dict[str, Any]] = {
    bool: {"type": "boolean"}, int: {"type": "integer"}, float: {"type": "number"},
    str: {"type": "string"}, type(None): {"type": "null"},
}  # fmt: skip


def schema() -> dict[str, Any]:
    """The schema as JSON values. Imports every stage and tier of the catalogue."""
    stage = {"from": {"type": "string", "description": "The stage to read; else the one above."}}
    stages = _one_of("stage", catalog.STAGES, stage | _properties(Wire))
    tiers = _one_of("tier", catalog.TIERS, _properties(Breaker))
    graph = _object(_properties(GraphOptions) | {"stages": _by_id("#/$defs/stage")})
    head = {
        "version": {"const": VERSION, "description": "The version of this format."},
        "extends": {"type": "string", "description": "A preset's name or a path to build on."},
    }
    whole = head | _properties(PipelineOptions) | {
        "tiers": _by_id("#/$defs/tier", _URL),
        "graphs": _object({name: {"$ref": "#/$defs/graph"} for name in GRAPHS}),
    }  # fmt: skip
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A tierloom pipeline",
        **_object(whole, required=["version"]),
        "$defs": {"graph": graph, **stages, **tiers},
    }


def schema_text() -> str:
    """The text of `configs/schema.json`."""
    return json.dumps(schema(), indent=1) + "\n"


def _object(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    whole = {"type": "object", "properties": properties, "additionalProperties": False}
    return whole | ({"required": required} if required else {})


def _by_id(ref: str, *others: dict[str, Any]) -> dict[str, Any]:
    """A mapping of ids; null takes one out of the base."""
    entry = {"anyOf": [{"$ref": ref}, *others, {"type": "null"}]}
    return {"type": "object", "additionalProperties": entry}


def _one_of(kind: catalog.Kind, names: dict[str, str], shared: dict[str, Any]) -> dict[str, Any]:
    """Definitions: one for each name, and `kind` itself, which picks by `use`.

    Without `use` (it is in the base) or with `module:Class` any option may stand there.
    """
    defs: dict[str, Any] = {}
    picks = []
    for name in sorted(names):
        cls = catalog.load_class(kind, name).Options
        properties = {"use": {"const": name}} | shared | _properties(cls)
        defs[f"{kind}.{name}"] = _object(properties, _required(cls))
        chosen = {"properties": {"use": {"const": name}}, "required": ["use"]}
        picks.append({"if": chosen, "then": {"$ref": f"#/$defs/{kind}.{name}"}})
    use = {"anyOf": [{"enum": sorted(names)}, {"type": "string", "pattern": ":"}]}
    defs[kind] = {"type": "object", "properties": {"use": use}, "allOf": picks}
    return defs


def _properties(cls: type[Any], without: set[str] | None = None) -> dict[str, Any]:
    kinds, docs = get_type_hints(cls, include_extras=True), field_docs(cls)
    found = {}
    for field in fields(cls):
        if field.name in (without or ()):
            continue
        doc = " ".join(docs[field.name].split())
        found[field.name] = _type(kinds[field.name]) | {"description": doc}
        if not is_dataclass(field.default) and field.default is not MISSING:
            kind, default = kinds[field.name], field.default
            is_time = default is not None and parse_seconds in _marks(kind)
            found[field.name]["default"] = seconds_text(default) if is_time else default
    return found


def _required(cls: type[Any]) -> list[str]:
    missing = (f for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING)
    return [f.name for f in missing]


def _marks(kind: Any) -> set[Any]:
    """What a type, or one that it is made of, is annotated with."""
    return {m for k in (kind, *get_args(kind)) for m in getattr(k, "__metadata__", ())}


def _type(kind: Any) -> dict[str, Any]:
    """What may be written for a type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        whole = parse_size in args or parse_rate in args
        plain = {"type": ["integer" if whole else "number", "string"]}
        timed = _TIME if parse_seconds in args else {}
        return plain | timed if any(map(callable, args[1:])) else _type(args[0])
    if origin in (Union, types.UnionType):
        return {"anyOf": [_type(a) for a in args]}
    if origin in (list, tuple):
        return {"type": "array", "items": _type(args[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(args[1])}
    if kind is Inner:
        return {"anyOf": [{"$ref": "#/$defs/tier"}, _URL]}
    if is_dataclass(kind):
        return _object(_properties(kind))  # type: ignore[arg-type]
    value: dict[str, Any] = {"enum": list(args)} if origin is Literal else _SIMPLE[kind]
    return dict(value) if kind in (str, type(None)) else {"anyOf": [value, _VARIABLE]}
