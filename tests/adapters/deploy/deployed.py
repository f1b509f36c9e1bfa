"""Files of configs/deploy, read as who starts them would: commands, ports, surroundings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer
import yaml

from tierloom.adapters.cli.commands import app

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "deploy"
_UNDER = {
    "docker-compose.observed.yaml": "docker-compose.central.yaml",
    "docker-compose.sglang.yaml": "docker-compose.yaml",
}
COMPOSED = sorted(FOLDER.glob("docker-compose*.yaml"))


class Command(NamedTuple):
    """A `tierloom` command of a file."""

    of: str
    """File and service."""
    words: list[str]
    environment: dict[str, str]


def composed(file: Path) -> dict[str, Any]:
    """With what a file is started over: `observed` is an addition to `central`."""
    made: dict[str, Any] = yaml.safe_load(file.read_text())
    if (name := _UNDER.get(file.name)) is None:
        return made
    under = composed(FOLDER / name)
    parts = ("services", "volumes", "secrets", "configs")
    return {part: {**under.get(part, {}), **made.get(part, {})} for part in parts}


def commands() -> Iterator[Command]:
    """Every `tierloom ...` of compose files, the manifest and the unit."""
    for file in COMPOSED:
        for name, service in yaml.safe_load(file.read_text())["services"].items():
            words = list(service.get("command", ()))
            if service.get("entrypoint", [""])[0] == "tierloom":
                words = [*service["entrypoint"][1:], *words]
            elif not service["image"].startswith("tierloom") or words[0].startswith("${"):
                continue
            yield Command(f"{file.name} {name}", words, dict(service.get("environment", {})))
    for manifest in manifests():
        if manifest["kind"] == "StatefulSet":
            (container,) = manifest["spec"]["template"]["spec"]["containers"]
            environment = {each["name"]: each["value"] for each in container["env"]}
            yield Command("kubernetes.yaml", container["args"], environment)
    text = unit()
    environment = {}
    for value in text["Environment"]:
        environment |= dict(pair.split("=", 1) for pair in value.split())
    words = text["ExecStart"][0].split()[1:]
    words = [re.sub(r"\$\{(\w+)\}", lambda m: environment[m[1]], word) for word in words]
    yield Command("tierloom.service", words, environment)


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))


def unit() -> dict[str, list[str]]:
    """Keys of the systemd unit, each with all its values."""
    found: dict[str, list[str]] = {}
    for line in (FOLDER / "tierloom.service").read_text().replace("\\\n", " ").splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def flags_of(command: str) -> dict[str, typer.models.ParamMeta]:
    """Options of a command of ours, by their flags."""
    group: Any = typer.main.get_command(app)
    return {flag: option for option in group.commands[command].params for flag in option.opts}


def value_of(words: list[str], flag: str) -> list[str]:
    """All of `--flag VALUE` or `--flag=VALUE`."""
    found = []
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name == flag:
            found.append(value if equals else following)
    return found


def transfer_of(service: dict[str, Any]) -> dict[str, Any]:
    """What vLLM is told of the connector; empty for what is no vLLM."""
    found = value_of(list(service.get("command", ())), "--kv-transfer-config")
    return dict(json.loads(found[0])) if found else {}
