"""The JSON Schema: the committed one is the generated one, and it tells right from wrong."""

from __future__ import annotations

import json
from importlib import resources

import jsonschema
import pytest
import yaml

from tierloom.pipeline import schema
from tierloom.pipeline.spec import presets

CONFIGS = resources.files("tierloom") / "configs"


@pytest.fixture(scope="module")
def validator():
    whole = schema.schema()
    jsonschema.Draft202012Validator.check_schema(whole)
    return jsonschema.Draft202012Validator(whole)


def test_the_committed_schema_is_the_generated_one() -> None:
    committed = (CONFIGS / "schema.json").read_text()
    assert committed == schema.written(), "run: tierloom schema --write configs/schema.json"


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
        store("{use: put}"),
        store("{use: lookup, want: all}"),
        store("{use: gather, when_full: never}"),
    ],
)
def test_wrong_files(validator, text) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(yaml.safe_load(text))


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
    bare = {n for n, p in properties(json.loads(schema.written())) if "description" not in p}
    assert bare <= structure
