"""`tierloom deploy`: files with which tierloom is run as a service, written to be changed."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from tierloom.pipeline.config.problems import nearest
from tierloom.stages.errors import ConfigError

_IMAGE = ("deploy/Dockerfile", "deploy/.dockerignore")
_RULES = ("deploy/prometheus.yml", "observe/tierloom.rules.yaml", "observe/grafana-dashboard.json")
DEPLOYMENTS = {
    "store": ("deploy/docker-compose.yaml", *_IMAGE),
    "central": ("deploy/docker-compose.central.yaml", *_IMAGE),
    "observed": (
        "deploy/docker-compose.observed.yaml", "deploy/docker-compose.central.yaml", *_RULES,
        *_IMAGE,
    ),
    "pd": ("deploy/docker-compose.pd.yaml", *_IMAGE),
    "mooncake": ("deploy/docker-compose.mooncake.yaml", *_IMAGE),
    "cluster": ("deploy/docker-compose.cluster.yaml", *_IMAGE),
    "sglang": ("deploy/docker-compose.sglang.yaml", "deploy/docker-compose.yaml", *_IMAGE),
    "kubernetes": ("deploy/kubernetes.yaml", *_IMAGE),
    "systemd": ("deploy/tierloom.service",),
}  # fmt: skip
"""Names, and the files of each below `configs/`; the first says what it is for."""


def deploy(
    name: Annotated[str, typer.Argument(help="Which; without it all are listed.")] = "",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder for the files; made if need be."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Write the files that run tierloom as a service: compose files, Kubernetes, systemd.

    tierloom deploy central --out kv
    """
    configs = resources.files("tierloom") / "configs"
    if not name:
        for each, (first, *_) in DEPLOYMENTS.items():
            typer.echo(f"{each:<12}{_purpose((configs / first).read_text('utf-8'))}")
        return
    if name not in DEPLOYMENTS:
        raise ConfigError(f"deploy: nothing is called {name!r}; {nearest(name, DEPLOYMENTS)}")
    if out is None:
        raise ConfigError(f"deploy {name}: name a folder for its files: --out DIR")
    files = {out / file: configs / file for file in DEPLOYMENTS[name]}
    if there := [str(path) for path in files if path.exists() and not force]:
        raise ConfigError(f"{there[0]} is there already: name another folder, or use --force")
    for path, source in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read_bytes())
    start = next(iter(files))
    typer.echo(f"wrote {len(files)} files into {out}; {start} says how to start it")


def _purpose(text: str) -> str:
    """The first sentence of a file's comment."""
    lines = [line.lstrip("# ") for line in text.splitlines()]
    return " ".join(lines[: lines.index("")]).partition(". ")[0].rstrip(".")
