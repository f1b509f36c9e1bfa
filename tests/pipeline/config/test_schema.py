"""The JSON Schema: the committed one is the generated one, and it tells right from wrong."""

from __future__ import annotations

import json
from importlib import resources

import jsonschema
import pytest
import yaml

from tierloom.pipeline.config import schema
from tierloom.pipeline.config.presets import presets

CONFIGS = resources.files("tierloom") / "configs"


@pytest.fixture(scope="module")
def validator():
    whole = schema.schema()
    jsonschema.Draft202012Validator.check_schema(whole)
    return jsonschema.Draft202012Validator(whole)


def test_the_committed_schema_is_the_generated_one() -> None:
    committed = (CONFIGS / "schema.json").read_text()
    assert committed == schema.schema_text(), "run: tierloom schema --write configs/schema.json"


@pytest.mark.parametrize("name", presets())
def test_presets_are_valid(validator, name) -> None:
    validator.validate(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))


def store(stage: str) -> str:
    return f"{{version: 1, graphs: {{store: {{stages: {{x: {stage}}}}}}}}}"


@pytest.mark.parametrize(
    "text",
    [
        "{version: 1, extends: tiered, tiers: {hot: {capacity: 1 MiB}, warm: null}}",
        "{version: 1, tiers: {hot: {use: 'mine:Tier', any: thing}}}",
        "{version: 1, tiers: {hot: 'redis://host', warm: {use: 'mine://x'}, cold: '${COLD}'}}",
        "{version: 1, chunk: {tokens: '${TOKENS}'}}",
        store("{use: lookup, tiers: [a], when_full: drop}"),
        store("{use: get, promote: null, hedge: 20 ms}"),
        "{version: 1, tiers: {hot: {use: files, path: x, ttl: 0, timeout: '${T:-2 s}'}}}",
        "{version: 1, tiers: {hot: {use: files, path: x, ttl: '0', capacity: 5000000}}}",
    ],
)
def test_right_files(validator, text) -> None:
    validator.validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "{version: 2}",
        "{version: 1, teirs: {}}",
        "{version: 1, graphs: {stroe: {}}}",
        "{version: 1, chunk: {tokens: many}}",
        "{version: 1, tiers: {hot: {use: memory, capacity: [1]}}}",
        "{version: 1, tiers: {hot: {use: memroy}}}",
        "{version: 1, tiers: {hot: memory}}",
        "{version: 1, tiers: {hot: {use: memory, capacity: 1, path: x}}}",
        "{version: 1, tiers: {hot: {use: files, path: x, ttl: 250}}}",
        "{version: 1, tiers: {hot: {use: files, path: x, timeout: '250'}}}",
        "{version: 1, graphs: {store: {deadline: 0.5}}}",
        store("{use: get, hedge: 20}"),
        store("{use: put}"),
        store("{use: lookup, want: all}"),
        store("{use: gather, when_full: never}"),
    ],
)
def test_wrong_files(validator, text) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(yaml.safe_load(text))


def test_defaults_are_right_too(validator) -> None:
    """Editors write them down: a time's has its unit."""

    def with_defaults(node):
        if isinstance(node, dict):
            if "default" in node:
                yield node
            for value in node.values():
                yield from with_defaults(value)
        elif isinstance(node, list):
            for value in node:
                yield from with_defaults(value)

    found = list(with_defaults(json.loads(schema.schema_text())))
    assert any(node["default"] == "60 s" for node in found)
    for node in found:
        validator.evolve(schema=node).validate(node["default"])


def test_every_option_is_described() -> None:
    def properties(node):
        if isinstance(node, dict):
            yield from node.get("properties", {}).items()
            for value in node.values():
                yield from properties(value)
        elif isinstance(node, list):
            for value in node:
                yield from properties(value)

    structure = {"use", "tiers", "graphs", "stages", "store", "retrieve"}
    bare = {n for n, p in properties(json.loads(schema.schema_text())) if "description" not in p}
    assert bare <= structure
